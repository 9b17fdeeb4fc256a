"""data.ptx, PPO's instruction rows, as the data of a stage that reads such rows."""

from dataclasses import replace

from omegaconf import OmegaConf

from posttrain.config.schema import DataConfig
from posttrain.config.stages import InstructionColumns
from posttrain.paths import CONF


def ptx_data(data: DataConfig) -> DataConfig:
    """A mixture of the sources of data.ptx, none of whose rows is held out; columns are called as in sft."""
    files = [OmegaConf.load(CONF / "data" / name) for name in ("base.yaml", "sft.yaml")]
    columns = InstructionColumns(**dict(OmegaConf.merge(*files).columns))
    own = replace(data, mixture=data.ptx, ptx=[], eval={}, columns=columns, ignored_columns=[])
    return replace(own, dataset_name=[part.name for part in data.ptx], dataset_test_split=None, test_size=0)
