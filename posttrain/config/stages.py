"""What is known about each stage without torch, in one record; how it is trained is in stages/<name>.py.

A new stage is one more record here, a yaml of its name in conf/stage/ and in conf/data/, and its module.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from posttrain.config.schema import Columns, StageConfig, key
from posttrain.config.suggest import one_of
from posttrain.config.trl_fields import dpo_losses
from posttrain.values import JsonObject


@dataclass
class SFTStage(StageConfig):
    """Supervised fine-tuning."""


@dataclass
class RewardStage(StageConfig):
    """Reward modelling."""

    label_smoothing: float = key(at_least=0, below=0.5)
    ties: str = key(choices=("drop", "half"))
    best_accuracy: float | None = key(above=0.5, at_most=1)


@dataclass
class DPOStage(StageConfig):
    """Direct preference optimisation."""

    reference: str | None = key()
    beta: float = key(above=0, below=1e3, trl="beta")


@dataclass
class KTOStage(DPOStage):
    """Kahneman-Tversky optimisation."""

    batch_size: int = key(at_least=2, trl="per_device_train_batch_size")  # its KL is estimated within a batch
    desirable_weight: float = key(above=0, below=1e3, trl="desirable_weight")
    undesirable_weight: float = key(above=0, below=1e3, trl="undesirable_weight")


@dataclass
class OnlineStage(StageConfig):
    """What every stage has that samples completions, scores them and learns from them."""

    max_length: int = key(at_least=2)  # TRL's online trainers have no such argument
    max_new_tokens: int = key(at_least=1, trl="max_completion_length")
    temperature: float = key(above=0, below=1e3, trl="temperature")
    rollout_batch_size: int = key(at_least=1, trl="generation_batch_size")
    num_mini_batches: int = key(at_least=1)
    ppo_epochs: int = key(at_least=1, trl="num_iterations")  # passes over each rollout
    micro_batch_tokens: int | None = key(at_least=2)
    clip_ratio: float = key(above=0, below=1, trl="epsilon")
    clip_ratio_high: float | None = key(above=0, trl="epsilon_high")
    dual_clip: float | None = key(above=1)
    target_kl: float | None = key(above=0)
    entropy_coef: float = key(at_least=0)
    ptx_coef: float = key(at_least=0)
    kl_coef: float = key(at_least=0, below=1e3)
    kl_controller: str = key(choices=("fixed", "adaptive"))
    kl_target: float = key(above=0)
    kl_horizon: float = key(above=0)
    kl_ceiling: float | None = key(above=0)
    reward_model: str | None = key()
    reward_functions: list[str] = key()
    reward_weights: list[float] | None = key()
    eval_reward_functions: list[str] = key()
    gate: str = key(choices=("stop", "warn"))
    reward_scale: float = key(above=0)
    reward_clip: float | None = key(above=0)
    length_penalty: float = key(at_least=0)
    missing_eos_penalty: float = key(at_least=0)
    use_vllm: bool = key(trl="use_vllm")
    vllm_importance_sampling_cap: float | None = key(above=0)
    use_transformers_continuous_batching: bool = key(trl="use_transformers_continuous_batching")

    @property
    def group(self) -> int:
        """Completions of each prompt."""
        return 1

    @property
    def kl_in_loss(self) -> bool:
        """Whether KL is a term of the loss, and not of the reward."""
        return False

    @property
    def needs_kl(self) -> bool:
        """Whether KL of a rollout is paid for, or stops the run; else the reference is asked at evaluations alone."""
        return self.kl_coef > 0 or self.kl_controller == "adaptive" or self.kl_ceiling is not None


@dataclass
class PPOStage(OnlineStage):
    """Reinforcement learning from a reward by proximal policy optimisation, in TRL's words where it had them."""

    gamma: float = key(at_least=0, at_most=1)
    lam: float = key(at_least=0, at_most=1)
    value_lam: float | None = key(at_least=0, at_most=1)
    vf_coef: float = key(at_least=0)
    cliprange_value: float | None = key(above=0)
    whiten_advantages: bool = key()
    whiten_rewards: bool = key()
    critic: str = key(choices=("separate", "head"))
    critic_stop_gradient: bool = key()
    value_learning_rate: float | None = key(above=0, below=1e3)
    critic_warmup_steps: int = key(at_least=0)
    kl_estimator: str = key(choices=("k1", "k3"))


@dataclass
class GRPOStage(OnlineStage):
    """Reinforcement learning from a reward, each completion against others to the same prompt, in TRL's words."""

    num_generations: int = key(at_least=2)
    loss_type: str = key(choices=("grpo", "dapo", "dr_grpo", "rloo"))
    scale_rewards: str = key(choices=("group", "batch", "none"))
    kl_in_reward: bool = key()

    @property
    def group(self) -> int:
        return self.num_generations

    @property
    def kl_in_loss(self) -> bool:
        return self.kl_coef > 0 and not self.kl_in_reward and self.loss_type != "rloo"


@dataclass
class InstructionColumns(Columns):
    """The names that the documented columns have in the source."""

    messages: str | None = key()
    instruction: str | None = key()
    response: str | None = key()
    input: str | None = key()
    text: str | None = key()


@dataclass
class PreferenceColumns(Columns):
    """The names that the documented columns have in the source."""

    prompt: str | None = key()
    chosen: str = key()
    rejected: str = key()
    margin: str | None = key()
    group: str | None = key()


@dataclass
class PromptColumns(Columns):
    """The names that the documented columns have in the source; all others are handed to reward functions."""

    prompt: str | None = key()


class DataFormat(NamedTuple):
    """What rows are called, in `data.<name>=` of a pipeline and in the quickstart, how one looks, and its columns."""

    name: str
    row: str
    columns: type[Columns]


INSTRUCTIONS = DataFormat("instructions", '{"instruction": "…", "response": "…"}', InstructionColumns)


@dataclass
class RatingColumns(Columns):
    """The names that the documented columns have in the source."""

    prompt: str = key()
    completion: str = key()
    label: str = key()
    chosen: str = key()
    rejected: str = key()


RATINGS = DataFormat("ratings", '{"prompt": "…", "completion": "…", "label": true}', RatingColumns)
PREFERENCES = DataFormat("preferences", '{"prompt": "…", "chosen": "…", "rejected": "…"}', PreferenceColumns)
PROMPTS = DataFormat("prompts", '{"prompt": "…"}', PromptColumns)


@dataclass(frozen=True)
class StageSpec:
    """One stage. No field has a default: one that is forgotten is an error at import."""

    name: str  # of stage=<name>, its yaml files, its module and its folder in a run
    schema: type[StageConfig]
    data_format: DataFormat
    # stages of the same run that it takes the results of: the model to start from, then the reward model
    follows: tuple[str, ...]
    # whether its result scores conversations instead of writing completions
    is_classifier: bool
    trl_config: tuple[str, str]  # the class of its trainer's arguments: file in trl/trainer, name
    reserved: Mapping[str, str]  # argument of the trainer that cannot be set -> what to do instead
    check_trainer: Callable[[JsonObject], Iterator[str]]  # problems of arguments that are each valid alone
    title: str
    tag: str  # of a model card on the Hub
    unit: str  # what a batch is counted in
    sequences_per_row: int
    # names of metrics, `gold/` for all of stage.eval_reward_functions; labels and units are in metrics/catalogue.py
    headline: str  # says in a line what the stage did
    objective: str  # what a sweep returns
    shown: tuple[str, ...]  # before and after a run
    swept: tuple[str, ...]  # in the table of a sweep
    charts: tuple[tuple[str, ...], ...]  # over the steps of a run, several series to a chart
    frontier: tuple[str, ...]  # over the KL that each point of a sweep spent

    @property
    def is_online(self) -> bool:
        """Whether it samples completions and learns from their rewards."""
        return issubclass(self.schema, OnlineStage)

    @property
    def columns(self) -> type[Columns]:
        """The schema of data.columns."""
        return self.data_format.columns


def _sft_problems(trainer: JsonObject) -> Iterator[str]:
    if trainer.get("padding_free") and not trainer.get("packing"):
        yield "trainer.padding_free=true needs trainer.packing=true"


def _dpo_problems(trainer: JsonObject) -> Iterator[str]:
    given = trainer.get("loss_type") or "sigmoid"
    losses = given if isinstance(given, list) else [given]
    for name in losses:
        if name not in dpo_losses():
            yield one_of("trainer.loss_type", name, dpo_losses())
    for name, readers in LOSS_OPTIONS.items():
        if trainer.get(name) and not set(readers) & set(losses):
            yield f"trainer.{name} is read by trainer.loss_type={', '.join(readers)} only, not by {', '.join(losses)}"
    if "f_alpha_divergence_coef" in trainer and trainer.get("f_divergence_type") != "alpha_divergence":
        yield "trainer.f_alpha_divergence_coef is read by trainer.f_divergence_type=alpha_divergence only"


def no_problems(trainer: JsonObject) -> Iterator[str]:
    yield from ()


# options of TRL's DPO that only some of its losses read; the others would ignore them
LOSS_OPTIONS = {
    "label_smoothing": ("robust", "exo_pair", "aot", "aot_unpaired"),
    "discopop_tau": ("discopop",),
}


_FIXED_REFERENCE = "the reference stays as it is; a resumed run could not find another one again"

_BY_TEMPERATURE = (
    "completions are sampled and scored with temperature alone; anything else makes every probability ratio wrong"
)
_OWN_ORDER = "prompts are in memory, and each pass shuffles them by seed, so that a resumed run has the same order"

SFT = StageSpec(
    name="sft",
    schema=SFTStage,
    data_format=INSTRUCTIONS,
    follows=(),
    is_classifier=False,
    trl_config=("sft_config.py", "SFTConfig"),
    reserved={},
    check_trainer=_sft_problems,
    title="Supervised fine-tuning",
    tag="sft",
    unit="rows",
    sequences_per_row=1,
    headline="eval_loss",
    objective="eval_loss",
    shown=("eval_loss", "ended_by_eos"),
    swept=("eval_loss", "train_loss", "ended_by_eos"),
    charts=(("loss", "eval_loss"),),
    frontier=(),
)
REWARD = StageSpec(
    name="reward",
    schema=RewardStage,
    data_format=PREFERENCES,
    follows=("sft",),
    is_classifier=True,
    trl_config=("reward_config.py", "RewardConfig"),
    reserved={"label_smoothing_factor": "set stage.label_smoothing"},
    check_trainer=no_problems,
    title="Reward model",
    tag="reward-trainer",
    unit="pairs",
    sequences_per_row=2,
    headline="accuracy",
    objective="accuracy",
    shown=("eval_loss", "accuracy", "mean_margin"),
    swept=("accuracy", "mean_margin", "calibration_error", "length_correlation", "eval_loss"),
    charts=(("loss", "eval_loss"),),
    frontier=(),
)
PPO = StageSpec(
    name="ppo",
    schema=PPOStage,
    data_format=PROMPTS,
    follows=("sft", "reward"),
    is_classifier=False,
    trl_config=("rloo_config.py", "RLOOConfig"),
    reserved={
        "gradient_accumulation_steps": "it follows from stage.rollout_batch_size, num_mini_batches and batch_size",
        "beta": "set stage.kl_coef",
        **dict.fromkeys(("num_generations", "num_generations_eval"), "PPO takes one completion per prompt"),
        "steps_per_generation": "it follows from stage.rollout_batch_size and stage.batch_size",
        "reward_weights": "set stage.reward_weights",
        "reward_clip_range": "set stage.reward_clip",
        "normalize_advantages": "set stage.whiten_advantages",
        "mask_truncated_completions": "set stage.missing_eos_penalty",
        "use_transformers_paged": "set stage.use_transformers_continuous_batching",
        "remove_unused_columns": "reward functions see all columns",
        "label_smoothing_factor": "PPO's losses have none",
        "router_aux_loss_coef": "PPO's losses have none",
        "chat_template_kwargs": "prompts are rendered as for every other stage; set model.chat_template_path",
        "pad_to_multiple_of": "the completions of a rollout are padded to the longest",
        **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _FIXED_REFERENCE),
        **dict.fromkeys(
            (
                *("shuffle_dataset", "data_seed", "train_sampling_strategy", "length_column_name"),
                *("dataloader_drop_last", "dataloader_num_workers", "dataloader_prefetch_factor"),
                *("dataloader_persistent_workers", "dataloader_multiprocessing_context", "dataloader_in_order"),
                "dataloader_pin_memory",
            ),
            _OWN_ORDER,
        ),
        **dict.fromkeys(
            (
                *("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs"),
                "vllm_structured_outputs_regex",
            ),
            _BY_TEMPERATURE,
        ),
        "neftune_noise_alpha": "with noise, log-probabilities in training are not those of generation",
    },
    check_trainer=no_problems,
    title="PPO",
    tag="ppo",
    unit="episodes",
    sequences_per_row=1,
    headline="reward",
    objective="penalised_reward",
    shown=("reward", "gold/", "kl", "penalised_reward", "response_length", "ended_by_eos"),
    swept=("reward", "gold/", "kl", "response_length", "ended_by_eos"),
    charts=(
        ("reward", "eval_reward"),
        ("eval_gold/",),
        ("kl", "eval_kl"),
        ("response_length", "eval_response_length"),
        ("entropy",),
        ("explained_variance",),
        ("vllm_difference",),
    ),
    frontier=("reward", "gold/"),
)
DPO = StageSpec(
    name="dpo",
    schema=DPOStage,
    data_format=PREFERENCES,
    follows=("sft",),
    is_classifier=False,
    trl_config=("dpo_config.py", "DPOConfig"),
    reserved={
        "label_smoothing_factor": "set trainer.loss_type=[robust] and trainer.label_smoothing",
        "padding_free": "TRL's DPOTrainer pads, whatever is set (TRL 1.16)",
        **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _FIXED_REFERENCE),
    },
    check_trainer=_dpo_problems,
    title="DPO",
    tag="dpo",
    unit="pairs",
    sequences_per_row=2,
    headline="accuracy",
    objective="accuracy",
    shown=(
        *("eval_loss", "accuracy", "reward_margin", "chosen_logp_change", "rejected_logp_change"),
        *("kl", "response_length", "ended_by_eos"),
    ),
    swept=("accuracy", "reward_margin", "kl", "eval_loss"),
    charts=(("loss", "eval_loss"), ("rewards/accuracies", "eval_rewards/accuracies"), ("eval_kl",)),
    frontier=("accuracy",),
)

KTO = StageSpec(
    name="kto",
    schema=KTOStage,
    data_format=RATINGS,
    follows=("sft",),
    is_classifier=False,
    trl_config=("kto_config.py", "KTOConfig"),
    reserved={
        "label_smoothing_factor": "KTO's losses have none",
        **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _FIXED_REFERENCE),
        "train_sampling_strategy": "rows are drawn in a random order, which the KL term of each batch follows",
        **dict.fromkeys(
            ("precompute_ref_log_probs", "precompute_ref_batch_size"),
            "its KL term pairs the prompts and completions of each batch anew, which nothing can say beforehand",
        ),
    },
    check_trainer=no_problems,
    title="KTO",
    tag="kto",
    unit="completions",
    sequences_per_row=1,
    headline="reward_margin",
    objective="reward_margin",
    shown=(
        *("eval_loss", "reward_margin", "chosen_logp_change", "rejected_logp_change"),
        *("kl", "response_length", "ended_by_eos"),
    ),
    swept=("reward_margin", "kl", "eval_loss"),
    charts=(("loss", "eval_loss"), ("rewards/margins", "eval_rewards/margins"), ("eval_kl",)),
    frontier=("reward_margin",),
)

GRPO = replace(
    PPO,
    name="grpo",
    schema=GRPOStage,
    reserved={
        **{name: text.replace("PPO", "GRPO") for name, text in PPO.reserved.items()},
        "num_generations": "set stage.num_generations",
        "num_generations_eval": "held-out prompts are completed once each",
        "normalize_advantages": "set stage.scale_rewards",
    },
    title="GRPO",
    tag="grpo",
    charts=tuple(("frac_reward_zero_std",) if "explained_variance" in each else each for each in PPO.charts),
)


def other_models(stage: StageConfig) -> dict[str, str]:
    """The models that a stage takes besides the one it starts from: the key under `stage.` -> what it names."""
    keys = {"reward_model": OnlineStage, "reference": DPOStage}
    return {name: vars(stage)[name] for name, kind in keys.items() if isinstance(stage, kind) and vars(stage)[name]}


# in the order in which a pipeline runs them
STAGES = {spec.name: spec for spec in (SFT, REWARD, PPO, DPO, KTO, GRPO)}
PIPELINE = [spec.name for spec in (SFT, REWARD, PPO, DPO)]  # what it runs where it is not told
PAIRS = "pairs"  # a step of a pipeline that trains nothing: preferences sampled from the policy that there is by then
STEPS = [name for spec in STAGES.values() for name in ([PAIRS] if spec is DPO else []) + [spec.name]]
FORMATS = {spec.data_format.name: spec.data_format for spec in STAGES.values()}
# the stage whose prompts and rewards policies are compared by
EVALUATED_AS = PPO


def followers(name: str) -> list[StageSpec]:
    """The stages that take what this one makes, and can run once it has finished."""
    return [spec for spec in STAGES.values() if spec.follows and spec.follows[-1] == name]
