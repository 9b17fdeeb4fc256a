"""Proximal policy optimisation: our PPOTrainer with policy, critic, reference and reward model."""

from typing import TYPE_CHECKING

from posttrain.config.schema import Config
from posttrain.config.stages import PPOStage
from posttrain.errors import ConfigError
from posttrain.models.meta import Holdings, hold_model, meta_model, weight_bytes
from posttrain.rlhf import roles
from posttrain.stages import online
from posttrain.stages.base import DataSources, Stage, StageContext, StageData, load_policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.rlhf.ppo import PPOTrainer


def prepare(config: Config, tokenizer: "PreTrainedTokenizerBase", sources: DataSources) -> StageData:
    """As every online stage; and what the critic's keys ask of one another.

    Raises:
        ConfigError: stage.critic_stop_gradient without stage.critic=head, and what `online.prepare` raises.
    """
    assert isinstance(config.stage, PPOStage)
    if config.stage.critic_stop_gradient and not roles.critic_is_head(config):
        raise ConfigError("stage.critic_stop_gradient is read by stage.critic=head only")
    return online.prepare(config, tokenizer, sources)


def hold(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Holdings:
    """Policy and critic as one module, and the two frozen models beside them."""
    import torch

    from posttrain.rlhf.critic import ValueNetwork, add_value_adapter, critic_trunk

    settings, alone = config.model, hold_model(config, tokenizer)
    size = alone.trained.config.get_text_config().hidden_size
    with torch.device("meta"):
        if roles.critic_is_head(config):
            critic = ValueNetwork(size, on_policy=True)
            named = ("critic (a head on the policy)", weight_bytes(critic, settings))
        elif not settings.use_peft:
            critic = ValueNetwork(size, critic_trunk(meta_model(settings, False, len(tokenizer))))
            named = ("critic (all weights)", weight_bytes(critic, settings))
        else:
            add_value_adapter(alone.trained, alone.trained.peft_config["default"], like=None)
            critic = ValueNetwork(size)
            named = ("critic (an adapter on the same base)", alone.held[1][1])
    return online.hold_roles(config, tokenizer, alone, critic, [named])


def build(context: StageContext, model: "PreTrainedModel") -> "PPOTrainer":
    """The trainer with policy, critic, reference and reward."""
    from posttrain.rlhf.ppo import PPOConfig, PPOTrainer

    return online.build_as(PPOTrainer, PPOConfig, context, model)


STAGE = Stage(
    prepare=prepare,
    plan=online.plan,
    hold=hold,
    load=load_policy,
    build=build,
    preflight=online.preflight,
    evaluate_model=online.evaluate_model,
)
