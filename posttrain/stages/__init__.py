"""The stages, and the only list of them."""

from posttrain.stages import sft
from posttrain.stages.base import Stage

STAGES: dict[str, Stage] = {"sft": Stage(prepare=sft.prepare, build=sft.build, objective="eval_loss")}
