"""Group-relative policy optimisation: our GRPOTrainer with policy, reference and reward, and no critic."""

from typing import TYPE_CHECKING

from posttrain.config.schema import Config
from posttrain.config.stages import GRPOStage
from posttrain.console import say
from posttrain.errors import ConfigError
from posttrain.models.meta import Holdings, hold_model
from posttrain.stages import online
from posttrain.stages.base import DataSources, Stage, StageContext, StageData, load_policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.rlhf.grpo import GRPOTrainer


def prepare(config: Config, tokenizer: "PreTrainedTokenizerBase", sources: DataSources) -> StageData:
    """As every online stage.

    Raises:
        ConfigError: vLLM's correction is asked for at tokens where whole completions are one action, and what
            `online.prepare` raises.
    """
    stage = config.stage
    assert isinstance(stage, GRPOStage)
    if stage.vllm_importance_sampling_cap is not None and stage.loss_type == "rloo":
        raise ConfigError(
            "stage.vllm_importance_sampling_cap weighs tokens, and with stage.loss_type=rloo a completion is one "
            "action; leave it out, or take another loss_type"
        )
    return online.prepare(config, tokenizer, sources)


def hold(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Holdings:
    """The policy, and the two frozen models beside it."""
    return online.hold_roles(config, tokenizer, hold_model(config, tokenizer), None)


def build(context: StageContext, model: "PreTrainedModel") -> "GRPOTrainer":
    """The trainer with policy, reference and reward."""
    from posttrain.rlhf.grpo import GRPOConfig, GRPOTrainer

    stage = context.config.stage
    assert isinstance(stage, GRPOStage)
    say(
        f"loss: {stage.loss_type} over {stage.num_generations} completions of each prompt, rewards scaled by: "
        f"{stage.scale_rewards}, KL part of the {'loss' if stage.kl_in_loss else 'reward'}"
    )
    return online.build_as(GRPOTrainer, GRPOConfig, context, model)


STAGE = Stage(
    prepare=prepare,
    plan=online.plan,
    hold=hold,
    load=load_policy,
    build=build,
    preflight=online.preflight,
    evaluate_model=online.evaluate_model,
)
