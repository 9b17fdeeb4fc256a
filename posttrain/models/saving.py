"""The result of a run as a plain model folder, loaded again and compared before anyone relies on it."""

import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from posttrain.config.schema import CHANGE_BASE, Config
from posttrain.config.stages import STAGES
from posttrain.console import is_main_process, say
from posttrain.errors import PosttrainError
from posttrain.models.generate import scores
from posttrain.models.load import Load
from posttrain.models.lora import lora_config
from posttrain.paths import PACKAGE
from posttrain.runs.checkpoint import modes_by_umask, writing
from posttrain.runs.folder import RunFolder
from posttrain.runs.sharding import outside_zero_init

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.runs.safe_trainer import SafeTrainer

# The reloaded model's outputs must be those of the trained one, up to rounding (relative to the largest of them)
RELOAD_TOLERANCE = {"no": 1e-3, "bf16": 0.1, "fp16": 0.05}
PROBE_TOKENS = 64


@outside_zero_init()
def save_model(
    config: Config,
    folder: RunFolder,
    trainer: "SafeTrainer",
    tokenizer: "PreTrainedTokenizerBase",
    base: str,
    load: Load,
) -> None:
    """Write model/ and, after LoRA, adapter/ beside it; read model/ again and compare.

    Raises:
        PosttrainError: the saved model does not give the outputs of the trained one.
    """
    from accelerate.utils import is_peft_model
    from peft import PeftModel

    rows = _probe(trainer.train_dataset)
    _release_optimizer(trainer)
    # without the mixed-precision wrapper: weights are compared, not roundings
    is_classifier = STAGES[config.stage.name].is_classifier
    with trainer.unwrapped_model(keep_fp32_wrapper=False) as trained:
        trained.eval()
        expected = _outputs(trained, rows, tokenizer.pad_token_id, is_classifier)
    if is_peft_model(trained):
        with writing(folder.adapter):
            if config.model.lora_init_weights not in CHANGE_BASE:
                trainer.save_model(str(folder.adapter))
            elif is_main_process():
                _save_on_base(trained, load(config, tokenizer, base), config, folder.adapter)
        if is_main_process():
            fresh = load(config, tokenizer, base, quantised=False)
            merged = PeftModel.from_pretrained(fresh, str(folder.adapter)).merge_and_unload()
            if hasattr(fresh, "generation_config"):
                merged.generation_config = fresh.generation_config
            with writing(folder.model):
                merged.save_pretrained(folder.model)
                tokenizer.save_pretrained(folder.model)
            del fresh, merged
    else:
        with writing(folder.model):
            trainer.save_model(str(folder.model))
    trainer.accelerator.wait_for_everyone()
    if not is_main_process():
        return
    for written in (folder.model, folder.adapter):
        modes_by_umask(written)
    actual = _scores_in_a_new_process(folder.model, rows) if is_classifier else _logits_of(folder.model, rows, config)
    scale = max(float(expected.abs().max()), 1.0)
    difference = float((actual - expected).abs().max()) / scale
    what = "scores" if is_classifier else "logits"
    # FSDP2 and DeepSpeed compute in mixed precision always; a base that was quantised in training is not in the result
    tolerance = RELOAD_TOLERANCE[trainer.rounds_as if trainer.shards else trainer.weights_as]
    quantised = config.model.load_in_4bit or config.model.load_in_8bit
    say(f"saved model: reloaded, its {what} are within {difference:.1e} of the trained model's")
    if not math.isfinite(difference) or (not quantised and difference > tolerance):
        raise PosttrainError(
            f"{folder.model} does not give the {what} of the trained model (relative difference {difference:.1e}, "
            f"at most {tolerance:.0e} is rounding); the checkpoint in {folder.path} is whole"
        )


def _save_on_base(trained: "PeftModel", fresh: "PreTrainedModel", config: Config, folder: Path) -> None:
    """Save an adapter whose first weights were taken out of the base as one of twice the rank on the base as it was.

    PEFT computes it from the first weights, which are a function of the base and so can be had again.
    """
    from peft import get_peft_model

    first = get_peft_model(fresh, lora_config(config.model, fresh, trained.active_peft_config.task_type))
    with TemporaryDirectory() as start:
        first.save_pretrained(start)
        trained.save_pretrained(folder, path_initial_model_for_weight_conversion=start)


def _release_optimizer(trainer: "SafeTrainer") -> None:
    """Make room: from here on models are loaded beside the trained one, and nothing is trained any more."""
    if trainer.shards:  # there the optimizer and the shards are one thing
        return
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    gc.collect()


def _probe(dataset: "Dataset") -> list[list[int]]:
    """A few rows as the model reads them."""
    columns = ("input_ids", "chosen_ids", "rejected_ids", "prompt_ids")
    names = [name for name in columns if name in dataset.column_names][:2]
    rows = [dataset[index] for index in range(min(4, len(dataset)))]
    return [row[name][:PROBE_TOKENS] for row in rows for name in names if row[name] is not None]


def _outputs(model: "PreTrainedModel", rows: Sequence[Sequence[int]], pad: int, is_classifier: bool) -> "Tensor":
    """The scores of a reward model; of a causal one the logits after the last token of each row."""
    import torch

    if is_classifier:
        return torch.tensor(scores(model, rows, pad))
    with torch.no_grad():
        last = [model(input_ids=torch.tensor([row], device=model.device)).logits[0, -1].float().cpu() for row in rows]
    return torch.stack(last)


def _logits_of(folder: Path, rows: list[list[int]], config: Config) -> "Tensor":
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=config.model.dtype).eval()
    return _outputs(model, rows, model.config.pad_token_id, is_classifier=False)


def _scores_in_a_new_process(folder: Path, rows: list[list[int]]) -> "Tensor":
    """A reward model is used by processes that know nothing of this one: padding, head and all come from its folder."""
    import torch

    path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.models.saving", str(folder)],
        input=json.dumps(rows),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        raise PosttrainError(
            f"{folder} cannot be loaded again: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}"
        )
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Score the rows on standard input with the model whose folder is named, loaded as any user would."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    [folder] = sys.argv[1:]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    pad = AutoTokenizer.from_pretrained(folder).pad_token_id
    sys.stdout.write("\n" + json.dumps(scores(model, json.load(sys.stdin), pad)) + "\n")


if __name__ == "__main__":
    main()
