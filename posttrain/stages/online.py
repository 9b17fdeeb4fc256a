"""What every stage does that samples completions and learns from their rewards: prompts, roles, logs, evaluations."""

import importlib.util
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar, cast

from posttrain.config.ptx import ptx_data
from posttrain.config.schema import Config
from posttrain.config.stages import STAGES, OnlineStage, PPOStage
from posttrain.console import counted, is_main_process, say, warn
from posttrain.data.encode import ConversationEncoding, PromptEncoding, from_text
from posttrain.data.formats import Prompt, instructions, prompts
from posttrain.data.prepared import Encoded
from posttrain.data.splits import Example
from posttrain.devices import on_all_processes, process_state
from posttrain.errors import ConfigError, PosttrainError
from posttrain.metrics.catalogue import GOLD
from posttrain.metrics.comparison import REWARD, measured, over_optimised
from posttrain.metrics.report_card import FIT
from posttrain.models.generate import COMPLETED, complete
from posttrain.models.load import load_causal_lm
from posttrain.models.lora import lora_config
from posttrain.models.meta import Batch, Holdings, meta_model, weight_bytes
from posttrain.models.resolve import beside, naming, parent_of, resolve_path
from posttrain.rlhf import rewards, roles, scoring
from posttrain.rlhf.diagnostics import Alarms, over_optimisation
from posttrain.rlhf.ptx import InstructionRows
from posttrain.rlhf.rollout_plan import RolloutPlan, plan_rollouts, wider
from posttrain.rlhf.scoring import RewardScorer
from posttrain.runs.arguments import trainer_arguments, trl_config
from posttrain.runs.checkpoint import writing
from posttrain.runs.folder import read_lines, read_object
from posttrain.stages.base import (
    DataSources,
    EvalResult,
    StageContext,
    StageData,
    StepPlan,
    prepare_rows,
    step_plan,
)
from posttrain.values import Fields

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.rlhf.critic import ValueNetwork
    from posttrain.rlhf.online import OnlineConfig, PromptRow, Rollout
    from posttrain.rlhf.policy import PolicyTrainer

T = TypeVar("T", bound="PolicyTrainer")
# what reward functions are handed besides a row's own columns
RESERVED_COLUMNS = {
    *("prompts", "prompt_ids", "completions", "completion_ids"),
    *("trainer_state", "log_extra", "log_metric"),
}


@dataclass
class PromptData(StageData):
    """With what completions are scored by, besides a reward model."""

    functions: list[rewards.RewardFunction]
    eval_functions: list[rewards.RewardFunction]


def prepare(config: Config, tokenizer: "PreTrainedTokenizerBase", sources: DataSources) -> StageData:
    """Read and encode the prompts; look at the reward before anything is loaded.

    Raises:
        ConfigError: the reward model is not fit (stage.gate=stop), a reward function cannot be found, or prompts and
            completions have no room.
    """
    stage = _stage(config)
    if stage.max_new_tokens >= stage.max_length:
        raise ConfigError(
            f"stage.max_new_tokens={stage.max_new_tokens} leaves no room for a prompt in stage.max_length="
            f"{stage.max_length}, which counts both"
        )
    if stage.vllm_importance_sampling_cap is not None and not stage.use_vllm:
        raise ConfigError("stage.vllm_importance_sampling_cap is read by stage.use_vllm=true only")
    if stage.micro_batch_tokens is not None and stage.micro_batch_tokens < stage.max_length:
        raise ConfigError(
            f"stage.micro_batch_tokens={stage.micro_batch_tokens} has no room for an episode of stage.max_length="
            f"{stage.max_length} tokens; set at least that many"
        )
    plan_rollouts(stage, stage.rollout_batch_size, process_state().num_processes)  # before the rows are read
    if stage.use_vllm and not config.dry_run and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "stage.use_vllm=true: vLLM is not installed; pip install 'posttrain[vllm]' on a machine with a GPU"
        )
    check_rewards(config)
    functions = _functions("stage.reward_functions", stage.reward_functions)
    eval_functions = _functions("stage.eval_reward_functions", stage.eval_reward_functions)
    for function in eval_functions:
        if inspect.iscoroutinefunction(function):
            raise ConfigError(f"stage.eval_reward_functions: {function.__name__} is async; only rewards may be")
    found = prepare_rows(config, tokenizer, sources, prompts, PromptEncoding, stage.max_new_tokens)
    taken = set(found.prepared.columns) & RESERVED_COLUMNS
    if taken:
        raise ConfigError(
            f"data.dataset_name={config.data.dataset_name}: column {min(taken)!r} has the name of something else that "
            "reward functions are handed; rename it"
        )
    count = len(found.train.dataset)
    if count < stage.rollout_batch_size // stage.group:
        warn(
            f"{count} prompts are fewer than the {stage.rollout_batch_size // stage.group} of a rollout "
            f"(stage.rollout_batch_size={stage.rollout_batch_size}): some are taken more than once in it"
        )
    if config.data.ptx:
        own, sources = replace(config, data=ptx_data(config.data)), replace(sources, sources=sources.ptx)
        encoding = partial(ConversationEncoding, train_on=config.data.train_on)
        ptx = prepare_rows(own, tokenizer, sources, instructions, encoding)
        found.prepared.add_ptx(ptx.prepared)
    return PromptData(**vars(found), functions=functions, eval_functions=eval_functions)


def _stage(config: Config) -> OnlineStage:
    assert isinstance(config.stage, OnlineStage)
    return config.stage


def check_rewards(config: Config) -> None:
    """The weights' number, and the gate before the reward model."""
    stage = _stage(config)
    count = len(stage.reward_functions) + (stage.reward_model is not None)
    if stage.reward_weights is not None and len(stage.reward_weights) != count:
        raise ConfigError(
            f"stage.reward_weights has {len(stage.reward_weights)} numbers for {count} rewards (the reward model "
            "first, if there is one, then stage.reward_functions)"
        )
    if stage.reward_model is None:
        return
    with naming("stage.reward_model"):
        folder = Path(resolve_path(beside(config.model, stage.reward_model)))
    parent = parent_of(folder) if folder.is_dir() else None
    if parent is not None and not (parent["stage"] in STAGES and STAGES[parent["stage"]].is_classifier):
        raise ConfigError(f"stage.reward_model={stage.reward_model} is a run of stage={parent['stage']}, not of reward")
    verdict = read_object(
        folder.parent / "report_card.json", ("verdict", "reasons"), "train the reward model again with overwrite=true"
    )
    if verdict is None:
        warn(f"reward model {stage.reward_model}: no report_card.json found: quality unknown")
        return
    said = verdict["verdict"] + (f" ({'; '.join(verdict['reasons'])})" if verdict["reasons"] else "")
    if verdict["verdict"] == FIT:
        say(f"reward model {stage.reward_model}: {said}")
    elif stage.gate == "warn":
        warn(f"reward model {stage.reward_model}: {said}; its mistakes will be optimised as well (stage.gate=warn)")
    else:
        raise ConfigError(
            f"stage.reward_model={stage.reward_model} is not good enough to optimise against: {said}. Train it on more "
            f"or better pairs, or go on with stage.gate=warn (in a pipeline {stage.name}.gate=warn)"
        )


def _functions(key: str, specs: list[str]) -> list[rewards.RewardFunction]:
    found = [rewards.load_function(key, spec) for spec in specs]
    names = [function.__name__ for function in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"{key} names two functions alike ({', '.join(names)})")
    return found


def plan(config: Config, rows: int, processes: int) -> StepPlan:
    """The rollouts of a run, and the updates between them."""
    stage = _stage(config)
    rollouts = plan_rollouts(stage, rows, processes)
    per_epoch = rollouts.rollouts_per_epoch * rollouts.steps_per_rollout
    note = (
        f"rollout: {stage.rollout_batch_size // stage.group} prompts completed"
        + (f" {stage.group} times each" if stage.group > 1 else "")
        + f", learned from in {counted(stage.ppo_epochs, 'epoch')} of {counted(stage.num_mini_batches, 'update')}"
    )
    return step_plan(config, STAGES[stage.name].unit, rollouts.accumulation, per_epoch, processes, note)


def hold_roles(
    config: Config,
    tokenizer: "PreTrainedTokenizerBase",
    policy_alone: Holdings,
    critic: "ValueNetwork | None",
    named: Sequence[tuple[str, int]] = (),
) -> Holdings:
    """Policy and critic as one module, and the two frozen models beside them; `named` is the critic's line."""
    import torch

    from posttrain.rlhf.critic import VALUE, PolicyAndValue

    stage, settings = _stage(config), config.model
    held = [*policy_alone.held, *named]
    source = roles.find_reward(config, tokenizer)
    shared = source.adapter is not None if source is not None else settings.use_peft
    if not settings.use_peft:
        held.append(("reference (frozen copy)", held[0][1]))
    if source is not None or not stage.reward_functions:
        if shared:
            held.append(("reward model (an adapter on the same base)", held[1][1]))
        else:
            alone = beside(settings, (source.settings if source is not None else settings).start)
            model = meta_model(alone, True, len(source.tokenizer if source is not None else tokenizer))
            held.append(("reward model (frozen)", weight_bytes(model, alone)))
    both = PolicyAndValue(policy_alone.trained, critic, stage.temperature, stage.entropy_coef > 0)

    def loss(batch: Batch, completion: int) -> "torch.Tensor":
        ids, mask = batch["input_ids"], batch["attention_mask"]
        rows, width = ids.shape
        places = torch.arange(rows * width).view(rows, width)
        positions = mask.cumsum(-1) - 1
        ptx = (ids, mask, positions, places[:, 1:].flatten()) if stage.ptx_coef else None
        said = both(**batch, position_ids=positions, picked=places[:, width - completion :].flatten(), instructions=ptx)
        total: torch.Tensor = said.logps.sum() + said.values.sum() + said.entropy.sum()
        return total if said.instructions is None else total + said.instructions.sum()

    def hidden_loss(batch: Batch) -> "torch.Tensor":
        if critic is not None and critic.on_policy:
            return policy_alone.hidden_loss(batch)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        policy = policy_alone.hidden_loss(batch) + (policy_alone.hidden_loss(batch) if stage.ptx_coef else 0)
        if critic is None:
            return policy
        return policy + both.hidden(VALUE, ids, mask, mask.cumsum(-1) - 1).sum()

    return Holdings(both, [both], held, loss, hidden_loss)


def build_as(
    trainer_class: "type[T]", arguments_class: "type[OnlineConfig]", context: StageContext, model: "PreTrainedModel"
) -> "T":
    """A trainer of this class with policy, critic if it has one, reference and reward."""
    config, data, tokenizer = context.config, context.data, context.tokenizer
    assert isinstance(data, PromptData)
    stage = _stage(config)
    rollouts = plan_rollouts(stage, len(data.train.dataset), process_state().num_processes)
    source = roles.find_reward(config, tokenizer)
    arguments = {"vllm_max_model_length": stage.max_length}  # a model's own may not fit into the memory
    arguments |= trainer_arguments(config, context.folder.path, data.test is not None) | {
        "stage": stage,
        "gradient_accumulation_steps": rollouts.accumulation,
        "steps_per_generation": rollouts.accumulation * rollouts.mini_batches,
        "include_num_input_tokens_seen": "no",  # TRL's generation counts them
        "reward_weights": stage.reward_weights,
    }
    functions, head = list(data.functions), None
    score: rewards.Score | None = None  # of the reward model, set once it is loaded

    def score_rows(ids: list[list[int]]) -> list[float]:
        assert score is not None
        return score(ids)

    def critic(policy: "PreTrainedModel") -> "ValueNetwork | None":
        nonlocal head
        head = roles.add_reward(policy, source)
        own = isinstance(stage, PPOStage)
        return roles.build_critic(config, policy, source, tokenizer, path) if own else None

    if source is not None:
        if not source.same_tokenizer:
            say("reward model: has a tokenizer of its own; completions are decoded and put through its chat template")
        functions.insert(0, rewards.model_reward(score_rows, scoring.encoding_for(source)))
    scorer = RewardScorer(functions, stage.reward_weights or [1.0] * len(functions), data.eval_functions)
    path, ptx = str(model.config._name_or_path), data.prepared.ptx
    earlier = read_lines(context.folder.metrics)  # what was logged before a resume
    trainer = trainer_class(
        rows=PromptRows(data.train, data.prepared.columns),
        plan=rollouts,
        reference=None if config.model.use_peft else load_causal_lm(config.model, tokenizer, path),
        value=critic,
        ptx=InstructionRows(ptx.dataset, tokenizer.pad_token_id, config.seed, rollouts) if ptx is not None else None,
        on_rollout=RolloutLog(context, rollouts, earlier),
        held_out=HeldOut(context, scorer, earlier),
        args=trl_config(arguments_class, arguments),
        model=model,
        reward_funcs=functions,
        train_dataset=data.train.dataset,
        eval_dataset=data.test.dataset if data.test else None,
        processing_class=tokenizer,
        peft_config=lora_config(config.model, model),
    )
    scorer.loop = trainer.reward_loop
    if source is not None and head is not None:
        score = partial(roles.scores_of_adapter, trainer, head)
    elif source is not None:
        with naming("stage.reward_model"):
            score = scoring.RewardModel.load(
                source, config.seed, trainer.args.device, wider(stage, 1, False), trainer.accelerator.autocast
            )
    roles.print_roles(config, source, path)
    return trainer


class PromptRows(Sequence["PromptRow"]):
    """What TRL hands to reward functions: each prompt, its ids and its other columns, None where a row lacks one."""

    def __init__(self, prompts: Encoded, columns: Sequence[str]) -> None:
        self.dataset, self.columns = prompts.dataset, dict.fromkeys(columns)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        row = self.dataset[index]
        columns = cast("Fields", from_text(row["columns"]))
        return {**self.columns, **columns, "prompt": from_text(row["prompt"]), "prompt_ids": row["prompt_ids"]}


class RolloutLog:
    """Writes samples of each rollout to rollouts.jsonl, and warns of what its numbers say."""

    def __init__(self, context: StageContext, rollouts: RolloutPlan, earlier: Sequence[Mapping[str, float]]) -> None:
        self.file = context.folder.rollouts
        steps = plan(context.config, rollouts.prompts, process_state().num_processes).steps
        self.alarms = Alarms(_stage(context.config), planned=math.ceil(steps / rollouts.steps_per_rollout))
        for entry in earlier:
            if "shaped_reward" in entry:  # a rollout
                self.alarms(entry)

    def __call__(self, trainer: "PolicyTrainer", rollout: "Rollout") -> None:
        if is_main_process():
            with writing(self.file), self.file.open("a", encoding="utf-8") as lines:
                for sample in rollout.samples:
                    line = {"step": trainer.state.global_step, "rollout": rollout.number, **sample}
                    lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        for alarm in self.alarms(rollout.numbers):
            warn(f"rollout {rollout.number + 1}: {alarm}")


class HeldOut:
    """Numbers of completions that the policy samples to held-out prompts; the run's generators are left as they were.

    KL is exact at each position of the sampled completions; `gold/<name>` is each of stage.eval_reward_functions.
    Scores have intervals, and are compared prompt by prompt with those before the first step.
    """

    def __init__(self, context: StageContext, scorer: RewardScorer, earlier: Sequence[Mapping[str, float]]) -> None:
        self.context, self.scorer = context, scorer
        self.scores: dict[str, dict[str, list[float | None]]] = {}  # of the newest evaluation, see EvalResult
        self.warned = {name for entry in earlier for name in over_optimised(entry, "eval_")}

    def __call__(self, trainer: "PolicyTrainer") -> dict[str, float]:
        if not self.context.panel:
            return {}
        own = self._numbers(trainer, "", self.context.panel)
        numbers = dict(own)
        for name, rows in self.context.panels.items():
            found = own if rows == self.context.panel else self._numbers(trainer, name, rows)
            numbers |= {f"{name}_{key}": value for key, value in found.items()}
        for name in over_optimised(own):
            if trainer.before is not None and name not in self.warned:
                self.warned.add(name)
                warn(over_optimisation(self.context.config, name, trainer.before["metrics"], own))
        return numbers

    def _numbers(self, trainer: "PolicyTrainer", name: str, prompts: Sequence[Example]) -> dict[str, float]:
        context, stage = self.context, _stage(self.context.config)

        def share(mine: list[tuple[int, Prompt]]) -> list[scoring.ScoredCompletion]:
            seeds, rows = zip(*mine, strict=True)
            with trainer.unwrapped_model() as policy:
                return scoring.score_answers(
                    policy,
                    trainer.reference,
                    context.data.encoder,
                    rows,
                    self.scorer,
                    context.new_tokens,
                    stage.temperature,
                    seeds,
                    trainer_state=trainer.state,
                    log_extra=trainer._log_completion_extra,
                    log_metric=trainer._log_metric,
                )

        rows = list(enumerate(cast("Sequence[Prompt]", prompts), context.config.seed))
        with trainer.seeded(f"held out {context.config.seed}"), trainer.accelerator.autocast():
            scored = on_all_processes(rows, share)
        if without := sum(each.scores[REWARD] is None for each in scored):
            raise PosttrainError(
                f"the reward is not a finite number for {without} of {len(scored)} held-out completions: no reward "
                f"function applies to them ({', '.join(self.scorer.names())})"
            )
        golds = {f"{GOLD}{each.__name__}": scoring.score_name(each) for each in self.scorer.eval_functions}
        found = {key: [each.scores[of] for each in scored] for key, of in {REWARD: REWARD, **golds}.items()}
        self.scores[name] = found
        first = trainer.before.get("scores", {}).get(name, {}) if trainer.before is not None else {}
        numbers = measured("kl", [each.kl for each in scored]) | {
            "response_length": fmean(each.length for each in scored),
            "ended_by_eos": fmean(each.ended for each in scored),
        }
        for key, values in found.items():
            numbers |= measured(key, values, first.get(key))
        return numbers | {"penalised_reward": numbers[REWARD] - stage.kl_coef * numbers["kl"]}


def preflight(context: StageContext, trainer: "PolicyTrainer") -> None:
    """See rlhf/preflight.py."""
    from posttrain.rlhf.preflight import check_start

    check_start(trainer)


def evaluate_model(context: StageContext, trainer: "PolicyTrainer") -> EvalResult:
    """Reward, gold reward, KL and length of completions sampled to held-out prompts, and the prompt panel."""
    named = tuple(f"eval_{name}_" for name in context.panels)
    found = trainer.evaluate()
    numbers = {name.removeprefix("eval_"): value for name, value in found.items() if not name.startswith(named)}
    with trainer.unwrapped_model() as policy, trainer.accelerator.autocast():
        completions = complete(policy, context.data.encoder, context.panel[:COMPLETED], context.new_tokens)
    assert isinstance(trainer.held_out, HeldOut)
    return EvalResult(numbers, completions, scores=dict(trainer.held_out.scores))
