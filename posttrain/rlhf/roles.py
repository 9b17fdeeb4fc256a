"""The roles of an online run, found and loaded: what the reward model is, where it lives, and what the critic is."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.config.schema import Config, ModelConfig
from posttrain.config.stages import OnlineStage, PPOStage
from posttrain.console import counted, say
from posttrain.models.generate import by_length, pad_right
from posttrain.models.load import hub_config, load_causal_lm, load_reward_model, load_tokenizer
from posttrain.models.resolve import beside, input_hashes, naming, parent_of, resolve_path, weight_hashes
from posttrain.rlhf import rewards

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.rlhf.critic import ValueNetwork
    from posttrain.rlhf.policy import PolicyTrainer


@dataclass
class RewardSource:
    """The reward model of a run, before it is known where it lives."""

    settings: ModelConfig
    path: str
    tokenizer: "PreTrainedTokenizerBase"
    same_tokenizer: bool
    adapter: Path | None  # of a reward model trained with LoRA on the policy's own base


def find_reward(config: Config, tokenizer: "PreTrainedTokenizerBase") -> RewardSource | None:
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    stage = config.stage
    if not isinstance(stage, OnlineStage) or stage.reward_model is None:
        return None
    settings = beside(config.model, stage.reward_model)
    with naming("stage.reward_model"):
        path = resolve_path(settings)
        theirs, _ = load_tokenizer(settings)
        is_encoder = type(hub_config(settings)) in MODEL_FOR_MASKED_LM_MAPPING
    adapter = Path(path).parent / "adapter"
    parent = parent_of(Path(path))
    start = Path(resolve_path(config.model))
    shared = (
        config.model.use_peft
        and parent is not None
        and (adapter / "adapter_model.safetensors").is_file()
        and start.is_dir()
        and parent["inputs"]["model"]["weights"] == weight_hashes(start)
    )
    if shared:
        input_hashes(adapter)  # refuses one that has changed
    # an encoder reads text of its own form, and reads it in both directions, as no critic may
    same = not is_encoder and rewards.same_tokenizer(theirs, tokenizer)
    return RewardSource(settings, path, theirs, same, adapter if shared else None)


def scores_of_adapter(trainer: "PolicyTrainer", head: "torch.Tensor", rows: list[list[int]]) -> list[float]:
    """What the merged reward model would give: its head on the hidden state of the last token that is not padding.

    By id, as transformers looks for it: a padding token that the policy has generated itself is passed over, too.
    """
    import torch

    from posttrain.rlhf.critic import REWARD

    found = torch.empty(len(rows))
    padding, head = trainer.processing_class.pad_token_id, head.to(trainer.args.device)
    for places in by_length([*map(len, rows)], trainer.wider):
        part = [rows[place] for place in places]
        ids = pad_right(part, padding).to(head.device)
        mask = pad_right([[1] * len(row) for row in part], 0).to(head.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with trainer.policy_and_value() as both, torch.no_grad(), trainer.accelerator.autocast():
            hidden = both.hidden(REWARD, ids, mask, positions)
        numbers = torch.arange(ids.size(1), device=head.device)
        last = hidden[torch.arange(len(part), device=head.device), (numbers * (ids != padding)).argmax(-1)]
        with torch.autocast(head.device.type, enabled=False):  # which whoever asks for scores may be in
            found[places] = (last.float() @ head.float().T)[:, 0].cpu()
    return found.tolist()


def add_reward(policy: "PreTrainedModel", reward: RewardSource | None) -> "torch.Tensor | None":
    """Put a reward model that is an adapter on the policy's base beside the policy's; returns its head (1, hidden)."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    from posttrain.rlhf.critic import add_reward_adapter

    if reward is None or reward.adapter is None:
        return None
    settings = PeftConfig.from_pretrained(str(reward.adapter))
    return add_reward_adapter(policy, settings, load_file(reward.adapter / "adapter_model.safetensors"))


def build_critic(
    config: Config,
    policy: "PreTrainedModel",
    reward: RewardSource | None,
    tokenizer: "PreTrainedTokenizerBase",
    path: str,
) -> "ValueNetwork":
    """The critic; it begins as the reward model's trunk with a new head, where that reads the policy's tokens."""
    from posttrain.rlhf import critic as value

    size, on_policy = policy.config.get_text_config().hidden_size, critic_is_head(config)
    if on_policy:
        return value.ValueNetwork(size, on_policy=True)
    if not config.model.use_peft:
        if reward is not None and reward.same_tokenizer:
            with naming("stage.reward_model"):
                taken = load_reward_model(
                    reward.settings, reward.tokenizer, reward.path, config.seed, quantised=False, new_head=False
                )
        else:
            taken = load_causal_lm(config.model, tokenizer, path)
        return value.ValueNetwork(taken.config.get_text_config().hidden_size, value.critic_trunk(taken))
    like = value.REWARD if reward is not None and reward.adapter is not None else None
    value.add_value_adapter(policy, policy.peft_config[like or value.POLICY], like)
    return value.ValueNetwork(size)


def critic_is_head(config: Config) -> bool:
    """Whether the critic reads the policy's own hidden states (stage.critic=head)."""
    return isinstance(config.stage, PPOStage) and config.stage.critic == "head"


def print_roles(config: Config, reward: RewardSource | None, path: str) -> None:
    lora = config.model.use_peft
    from_reward = reward is not None and (reward.adapter is not None if lora else reward.same_tokenizer)
    own_critic = isinstance(config.stage, PPOStage) and not critic_is_head(config)
    models = 1 if lora else 3 if own_critic else 2
    lines = [
        f"policy = {path}, {'a new adapter' if lora else 'all weights'}",
        f"reference = {path}, {'all adapters off' if lora else 'a frozen copy'}",
    ]
    if own_critic:
        lines.append(
            f"critic = {'the reward model' if from_reward else path}, "
            f"{'an adapter on the same base' if lora else 'all weights'}, with a new head that begins at 0"
        )
    elif isinstance(config.stage, PPOStage):
        lines.append("critic = a new head on the policy's own hidden states, which begins at 0")
    if reward is not None:
        shared = reward.adapter is not None
        models += not shared
        lines.append(
            f"reward model = {reward.path}, {'an adapter on the same base' if shared else 'frozen'}"
            + ("" if shared or not lora else " (trained with LoRA from the same SFT model, it would share the base)")
        )
    lines.append(f"{counted(models, 'model')} in memory")
    say("\n".join(lines))
