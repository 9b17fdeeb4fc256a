"""Whether a run fits its machine, what would make it fit or hold less, and how long it takes."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from posttrain.config.check import differences, to_dict
from posttrain.config.schema import Config
from posttrain.config.stages import STAGES, OnlineStage
from posttrain.config.trl_fields import trainer_arguments
from posttrain.console import say, show_table, warn
from posttrain.planning.machines import FSDP, ZERO, machine_of
from posttrain.planning.memory import MemoryPlan, plan_memory
from posttrain.stages.base import stage_named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GIB = 2**30
WORTH_SAVING = GIB  # of a smaller peak nothing needs to be saved
WORTH_TELLING = 0.05  # of the peak


def changes(config: Config) -> Iterator[tuple[str, Config]]:
    """What would hold less, of all that the run does not do already: what it means, and the configuration.

    The cheapest comes first: the same result, then the same for more time or traffic, then another result.
    """
    stage, trainer, settings = config.stage, config.trainer, config.model
    machine = machine_of(config)
    shared, quantised = machine.engine in (FSDP, ZERO), settings.load_in_4bit or settings.load_in_8bit

    def with_trainer(**more: object) -> Config:
        return replace(config, trainer={**trainer, **more})

    if half := stage.batch_size // 2:
        more = {} if isinstance(stage, OnlineStage) else {"gradient_accumulation_steps": _accumulation(config) * 2}
        yield "the same updates", replace(with_trainer(**more), stage=replace(stage, batch_size=half))
    once = "precompute_ref_log_probs"
    takes_once = once in trainer_arguments(*STAGES[stage.name].trl_config)
    if takes_once and not settings.use_peft and not trainer.get(once) and not shared:
        yield "the reference is read once", with_trainer(**{once: True})
    if isinstance(stage, OnlineStage) and stage.use_vllm and not trainer.get("vllm_enable_sleep_mode"):
        yield "vLLM makes room for training", with_trainer(vllm_enable_sleep_mode=True)
    if not trainer.get("gradient_checkpointing"):
        yield "a third more time", with_trainer(gradient_checkpointing=True)
    for name, engine, part in (("zero2", ZERO, machine.gradients), ("fsdp2", FSDP, machine.weights)):
        if machine.devices > 1 and part == 1 and not quantised:
            rest = {key: value for key, value in trainer.items() if key != once}  # which needs whole weights
            file = {**config.accelerate, "config_file": name}
            if machine.precision != "bf16":  # as the shipped files have it
                file["mixed_precision"] = machine.precision
            yield f"shared out by {engine}", replace(config, accelerate=file, trainer=rest)
    if not settings.use_peft:
        if "8bit" not in str(trainer.get("optim", "")) and not shared and importlib.util.find_spec("bitsandbytes"):
            yield "a coarser optimizer", with_trainer(optim="adamw_8bit")
        yield "an adapter alone is trained", replace(config, model=replace(settings, use_peft=True))
    elif not quantised and not shared:
        yield "coarser frozen weights", replace(config, model=replace(settings, load_in_4bit=True))


def _accumulation(config: Config) -> int:
    return int(config.trainer.get("gradient_accumulation_steps", 1))


def words(config: Config, changed: Config) -> str:
    """What a command line needs to be that of the changed configuration."""
    found = differences(to_dict(config), to_dict(changed))
    plain = {None: "false", True: "true"}
    values = {key: plain[new] if new is None or new is True else new for key, (_, new) in found.items()}
    return " ".join(f"{key.removesuffix('.config_file')}={value}" for key, value in values.items())


def cheapest(config: Config, peak: Callable[[Config], int], memory: int) -> Config | None:
    """The configuration with the cheapest changes whose peak is within that memory, if any is."""

    def changed(names: list[str]) -> Config:
        return functools.reduce(lambda found, name: dict(changes(found)).get(name, found), names, config)

    chosen: list[str] = []
    least = peak(config)
    while least > memory:
        for name in dict(changes(changed(chosen))):
            now = peak(changed([*chosen, name]))
            if now < least * (1 - WORTH_TELLING):
                break
        else:
            return None
        least, chosen = now, [*chosen, name]
    # what came before the last one may not be needed with it: of these the dearest goes first
    for name in dict.fromkeys(reversed(chosen[:-1])):
        fewer = [other for other in chosen if other != name]
        if peak(changed(fewer)) <= memory:
            chosen = fewer
    return changed(chosen)


def show_advice(config: Config, tokenizer: "PreTrainedTokenizerBase", longest: int, completion: int) -> MemoryPlan:
    """Print what a device holds, whether it fits, and what would help most."""
    machine, plan = machine_of(config), plan_memory(config, tokenizer, longest, completion)
    rows = [(f"holds {name}", _size(size)) for name, size in plan.held]
    rows += [(f"peak: {name}", _size(size)) for name, size in plan.parts.items() if size]
    show_table("memory of one device", ("", ""), rows, headed=False)
    summary = f"memory: about {_size(plan.peak)} {plan.moment}, of {_size(machine.memory)} on {machine.name}"

    known = {"": plan.peak}

    def peak(changed: Config) -> int:
        key = words(config, changed)
        if key not in known:
            known[key] = plan_memory(changed, tokenizer, longest, completion, peak_alone=True).peak
        return known[key]

    if plan.peak > machine.memory:
        warn(f"{summary}: it does not fit")
        fitting = cheapest(config, peak, machine.memory)
        if fitting is None:
            say("no change of the configuration makes it fit: plan for more devices or a smaller model")
        else:
            say(f"the cheapest change that fits, with {_size(peak(fitting))}:\n  {words(config, fitting)}")
        return plan
    say(f"{summary}, excluding Python and library overhead")
    found = changes(config) if plan.peak > WORTH_SAVING else ()
    saved = sorted(((plan.peak - peak(changed), cost, changed) for cost, changed in found), key=lambda each: -each[0])
    best = [
        f"\n  {words(config, changed)} ({cost}): {_size(less)} less"
        for less, cost, changed in saved[:3]
        if less > WORTH_TELLING * plan.peak
    ]
    if best:
        say("largest savings:" + "".join(best))
    return plan


def show_time(config: Config, plan: MemoryPlan, rows: int, tokens: int) -> None:
    """Print what each pass computes in the whole run, and how long that takes, where the device's peak is known.

    `rows` and `tokens` are those of an epoch; of an online stage, tokens of prompts.
    """
    machine, stage, mfu = machine_of(config), config.stage, config.plan.mfu
    if machine.tflops is None:
        return
    steps = stage_named(stage.name).plan(config, rows, machine.devices)
    if isinstance(stage, OnlineStage):
        # each completion at its longest; of the critic as much as of the policy
        tokens += rows * stage.max_new_tokens
        models = 2 if stage.reward_model is not None or not stage.reward_functions else 1
        passes = {
            "generation, if it were not bound by the memory's speed": plan.forward / 2,
            "reference and reward model": plan.forward / 2 * models,
            "log-probabilities and values of the rollout": plan.forward,
            "forward": plan.forward * stage.ppo_epochs,
            "backward": plan.backward * stage.ppo_epochs,
        }
    else:
        passes = {"forward": plan.forward, "backward": plan.backward}
    seen = tokens * steps.steps / steps.steps_per_epoch
    per_hour = machine.tflops * 1e12 * mfu * machine.devices * 3600
    table = [
        (name, f"{each * seen / 1e15:,.3g} PFLOP", _hours(each * seen / per_hour)) for name, each in passes.items()
    ]
    show_table("time of training", ("", "", ""), table, headed=False)
    say(
        f"time: about {_hours(sum(passes.values()) * seen / per_hour)} on {machine.devices} × {machine.name} at "
        f"{mfu:.0%} of its {machine.tflops:g} TFLOPS (plan.mfu), without evaluation, saving and padding"
    )


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.1f} min" if hours > 1 / 60 else f"{hours * 3600:.1f} s"


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
