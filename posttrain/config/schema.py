"""The typed schema of every key. Types stand here, values in conf/."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from posttrain.config.machines import DEVICES
from posttrain.values import JsonObject


def key(**limits: Any) -> Any:
    """A field without a value (values live in conf/) and with limits: above, at_least, at_most, below, choices.

    `trl` is the name that TRL or transformers use for it, where it reaches their trainer arguments.
    """
    return field(default=MISSING, metadata=limits)


@dataclass
class StageConfig:
    """The documented hyperparameters that every stage has."""

    name: str = key()
    learning_rate: float = key(above=0, below=1e3, trl="learning_rate")
    batch_size: int = key(at_least=1, trl="per_device_train_batch_size")
    num_epochs: float = key(above=0, trl="num_train_epochs")
    max_length: int = key(at_least=2, trl="max_length")
    warmup_steps: int = key(at_least=0, trl="warmup_steps")


# first weights of an adapter that PEFT takes out of the frozen ones, which are others from then on
CHANGE_BASE = ("pissa", "olora")


@dataclass
class ModelConfig:
    """The model and how it is trained, in the words of TRL's ModelConfig."""

    base_model: str = key()
    model_name_or_path: str | None = key()
    model_revision: str = key()
    from_scratch: bool = key()
    chat_template_path: str | None = key()
    trust_remote_code: bool = key()
    dtype: str = key(choices=("float32", "bfloat16", "float16", "auto"))
    attn_implementation: str | None = key()
    use_peft: bool = key()
    lora_r: int = key(at_least=1)
    lora_alpha: int = key(at_least=1)
    lora_dropout: float = key(at_least=0, below=1)
    lora_target_modules: Any = key()
    lora_target_parameters: list[str] | None = key()
    lora_exclude_modules: list[str] | None = key()
    lora_layers_to_transform: list[int] | None = key()
    lora_modules_to_save: list[str] | None = key()
    lora_trainable_token_indices: list[int] | None = key()
    lora_init_weights: str = key(choices=("default", "gaussian", "orthogonal", *CHANGE_BASE))
    use_rslora: bool = key()
    use_dora: bool = key()
    load_in_4bit: bool = key()
    load_in_8bit: bool = key()
    bnb_4bit_quant_type: str = key(choices=("nf4", "fp4"))
    use_bnb_nested_quant: bool = key()

    @property
    def start(self) -> str:
        """The model to start from; of a stage after SFT only once `resolve` has filled it in."""
        return self.model_name_or_path if self.model_name_or_path is not None else self.base_model


@dataclass
class Columns:
    """The names or dotted paths that the documented columns have in the source; these can go with every format."""

    system: str | None = key()
    history: str | None = key()
    tools: str | None = key()


ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass
class MessagesConfig:
    """What the messages of a conversation are called in the source."""

    role: str | None = key()
    content: str | None = key()
    roles: dict[str, str] = key()
    train: str | None = key()


@dataclass
class PreferenceConfig:
    """Which of two answers is better, where a column of its own says so."""

    winner: str | None = key()
    a: Any = key()
    b: Any = key()
    tie: Any = key()


@dataclass
class SourceConfig:
    """One of several sources; what it does not set is that of `data`."""

    name: str = ""
    weight: float | None = None
    max_rows: int | None = None
    split: str | None = None
    config: str | None = None
    columns: dict[str, str | None] = field(default_factory=dict)


@dataclass
class DataConfig:
    """Where the rows come from and what happens to those that do not fit."""

    dataset_name: Any = key()
    mixture: list[Any] = key()  # once it is checked, of SourceConfig
    dataset_config: str | None = key()
    dataset_train_split: str = key()
    dataset_test_split: str | None = key()
    test_size: float = key(at_least=0)
    max_rows: int | None = key(at_least=1)
    eval: dict[str, Any] = key()  # once it is checked, of SourceConfig
    ptx: Any = key()  # once it is checked, a list of SourceConfig
    max_eval_rows: int | None = key(at_least=1)
    min_margin: float | None = key()
    num_proc: int | None = key(at_least=1)
    cache_dir: str | None = key()
    overlength: str = key(choices=("truncate", "drop", "error"))
    bad_rows: str = key(choices=("error", "drop"))
    allow_special_tokens: bool = key()
    train_on: str = key(choices=("all", "last"))
    chat_template_kwargs: dict[str, Any] = key()
    columns: Columns = key()  # of the stage's data format
    messages: MessagesConfig = field(default_factory=MessagesConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    ignored_columns: list[str] = key()

    def parts(self) -> dict[str, Any]:
        """Key -> each source of the mixture, each named held-out set and each source of instruction rows."""
        mixture = {f"data.mixture[{at}]": part for at, part in enumerate(self.mixture)}
        ptx = {f"data.ptx[{at}]" if len(self.ptx) > 1 else "data.ptx": part for at, part in enumerate(self.ptx)}
        return mixture | {f"data.eval.{name}": part for name, part in self.eval.items()} | ptx


@dataclass
class PlanConfig:
    """The machine that a dry run plans for, where it is not this one."""

    devices: int | None = key(at_least=1)
    device: str | None = key(choices=tuple(DEVICES))
    memory: str | None = key()
    tflops: float | None = key(above=0)
    mfu: float = key(above=0, at_most=1)


@dataclass
class Config:
    """A whole run."""

    run_name: str = key(pattern=r"[A-Za-z0-9][A-Za-z0-9._-]*")
    output_dir: str = key()
    seed: int = key(at_least=0, at_most=2**32 - 1)
    precision: str = key(choices=("auto", "fp32", "bf16", "fp16"))
    dry_run: bool = key()
    overwrite: bool = key()
    move_aside: bool = key()
    accelerate: JsonObject = key()
    plan: PlanConfig = field(default_factory=PlanConfig)
    stage: StageConfig = key()
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: JsonObject = field(default_factory=dict)


def renamed(stage: StageConfig) -> dict[str, str]:
    """TRL's name -> ours, for every hyperparameter that goes to the trainer under another or the same name."""
    return {item.metadata["trl"]: item.name for item in dataclasses.fields(stage) if "trl" in item.metadata}
