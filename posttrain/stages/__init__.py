"""The stages, in the order in which a pipeline runs them, and the only list of them."""

from posttrain.stages import dpo, ppo, reward, sft
from posttrain.stages.base import Stage

STAGES: dict[str, Stage] = {"sft": sft.STAGE, "reward": reward.STAGE, "ppo": ppo.STAGE, "dpo": dpo.STAGE}
