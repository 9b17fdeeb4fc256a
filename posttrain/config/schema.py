"""The typed schema of every key. Types stand here, values in conf/."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from omegaconf import MISSING


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


@dataclass
class SFTStage(StageConfig):
    """Supervised fine-tuning."""


@dataclass
class RewardStage(StageConfig):
    """Reward modelling."""

    best_accuracy: float | None = key(above=0.5, at_most=1)


@dataclass
class DPOStage(StageConfig):
    """Direct preference optimisation."""

    beta: float = key(above=0, below=1e3, trl="beta")


@dataclass
class PPOStage(StageConfig):
    """Reinforcement learning from a reward by proximal policy optimisation, in TRL's words where it had them."""

    max_length: int = key(at_least=2)  # RLOOConfig has no such argument
    max_new_tokens: int = key(at_least=1, trl="max_completion_length")
    temperature: float = key(above=0, below=1e3, trl="temperature")
    rollout_batch_size: int = key(at_least=1, trl="generation_batch_size")
    num_mini_batches: int = key(at_least=1, trl="num_mini_batches")
    ppo_epochs: int = key(at_least=1, trl="num_iterations")
    clip_ratio: float = key(above=0, below=1, trl="epsilon")
    gamma: float = key(at_least=0, at_most=1, trl="gamma")
    lam: float = key(at_least=0, at_most=1, trl="lam")
    vf_coef: float = key(at_least=0, trl="vf_coef")
    cliprange_value: float | None = key(above=0, trl="cliprange_value")
    entropy_coef: float = key(at_least=0, trl="entropy_coef")
    whiten_advantages: bool = key(trl="whiten_advantages")
    whiten_rewards: bool = key(trl="whiten_rewards")
    value_learning_rate: float | None = key(above=0, below=1e3, trl="value_learning_rate")
    critic_warmup_steps: int = key(at_least=0, trl="critic_warmup_steps")
    kl_coef: float = key(at_least=0, below=1e3, trl="kl_coef")
    kl_estimator: str = key(choices=("k1", "k3"), trl="kl_estimator")
    kl_controller: str = key(choices=("fixed", "adaptive"), trl="kl_controller")
    kl_target: float = key(above=0, trl="kl_target")
    kl_horizon: float = key(above=0, trl="kl_horizon")
    kl_ceiling: float | None = key(above=0, trl="kl_ceiling")
    reward_model: str | None = key()
    reward_functions: list[str] = key()
    reward_weights: list[float] | None = key()
    eval_reward_functions: list[str] = key()
    gate: str = key(choices=("stop", "warn"))
    reward_scale: float = key(above=0, trl="reward_scale")
    reward_clip: float | None = key(above=0, trl="reward_clip")
    length_penalty: float = key(at_least=0, trl="length_penalty")
    missing_eos_penalty: float = key(at_least=0, trl="missing_eos_penalty")
    use_vllm: bool = key(trl="use_vllm")
    use_transformers_continuous_batching: bool = key(trl="use_transformers_continuous_batching")


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
    lora_modules_to_save: list[str] | None = key()
    use_rslora: bool = key()
    use_dora: bool = key()
    load_in_4bit: bool = key()
    load_in_8bit: bool = key()
    bnb_4bit_quant_type: str = key(choices=("nf4", "fp4"))
    use_bnb_nested_quant: bool = key()

    @property
    def start(self) -> str:
        """The model to start from; of a stage after SFT only once `inputs.with_inputs` has filled it in."""
        return self.model_name_or_path if self.model_name_or_path is not None else self.base_model


@dataclass
class InstructionColumns:
    """The names that the documented columns have in the source."""

    instruction: str = key()
    response: str = key()
    input: str = key()
    system: str = key()


@dataclass
class PreferenceColumns:
    """The names that the documented columns have in the source."""

    prompt: str = key()
    chosen: str = key()
    rejected: str = key()
    margin: str = key()


@dataclass
class PromptColumns:
    """The name that the documented column has in the source; all others are handed to reward functions."""

    prompt: str = key()


@dataclass
class DataConfig:
    """Where the rows come from and what happens to those that do not fit."""

    dataset_name: Any = key()
    dataset_config: str | None = key()
    dataset_train_split: str = key()
    dataset_test_split: str | None = key()
    test_size: float = key(at_least=0)
    max_rows: int | None = key(at_least=1)
    overlength: str = key(choices=("truncate", "drop", "error"))
    bad_rows: str = key(choices=("error", "drop"))
    allow_special_tokens: bool = key()
    columns: Any = key()  # InstructionColumns, PreferenceColumns or PromptColumns


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
    stage: Any = key()  # a StageConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: dict[str, Any] = field(default_factory=dict)


STAGE_SCHEMAS: dict[str, type[StageConfig]] = {
    "sft": SFTStage,
    "reward": RewardStage,
    "ppo": PPOStage,
    "dpo": DPOStage,
}
COLUMN_SCHEMAS = {
    "sft": InstructionColumns,
    "reward": PreferenceColumns,
    "ppo": PromptColumns,
    "dpo": PreferenceColumns,
}


class DataFormat(NamedTuple):
    """What rows of a stage are called, in `data.<name>=` of a pipeline and in the quickstart, and how one looks."""

    name: str
    row: str


_INSTRUCTIONS = DataFormat("instructions", '{"instruction": "…", "response": "…"}')
_PREFERENCES = DataFormat("preferences", '{"prompt": "…", "chosen": "…", "rejected": "…"}')
DATA_FORMATS = {
    "sft": _INSTRUCTIONS,
    "reward": _PREFERENCES,
    "ppo": DataFormat("prompts", '{"prompt": "…"}'),
    "dpo": _PREFERENCES,
}


def renamed(stage: StageConfig) -> dict[str, str]:
    """TRL's name -> ours, for every hyperparameter that goes to the trainer under another or the same name."""
    return {item.metadata["trl"]: item.name for item in dataclasses.fields(stage) if "trl" in item.metadata}
