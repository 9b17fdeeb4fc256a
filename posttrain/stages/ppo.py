"""Proximal policy optimisation: our PPOTrainer on TRL's RLOOTrainer, its four roles loaded and its rollouts told."""

import importlib.util
import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import Config, PPOStage
from posttrain.console import is_main_process, say, warn
from posttrain.data.encode import ChatEncoder, encode_prompts
from posttrain.data.formats import read_prompts
from posttrain.devices import process_state
from posttrain.errors import ConfigError
from posttrain.metrics.charts import draw_curves
from posttrain.metrics.comparison import GOLD
from posttrain.metrics.report_card import FIT
from posttrain.models.generate import ANSWERED, Answer, answer, completion_kl, generate
from posttrain.models.load import load_causal_lm, max_positions
from posttrain.models.lora import lora_config
from posttrain.models.resolve import beside, naming, parent_of, resolve_path
from posttrain.rlhf import rewards, roles
from posttrain.rlhf.diagnostics import Alarms
from posttrain.rlhf.rollout_plan import schedule
from posttrain.runs.arguments import trainer_arguments, trl_config
from posttrain.runs.checkpoint import writing
from posttrain.runs.folder import read_lines, read_object
from posttrain.stages.base import Judgement, Prepared, Stage, Work, load_policy, prepare_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from posttrain.rlhf.ppo import Rollout

# what reward functions are handed besides a row's own columns
RESERVED_COLUMNS = {
    *("prompts", "prompt_ids", "completions", "completion_ids"),
    *("trainer_state", "log_extra", "log_metric"),
}
SAMPLES = 4  # answers of each rollout that rollouts.jsonl keeps


@dataclass
class PreparedPrompts(Prepared):
    """With what answers are scored by, besides a reward model."""

    functions: list[rewards.RewardFunction]
    eval_functions: list[rewards.RewardFunction]


def prepare(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Prepared:
    """Read and encode the prompts; look at the reward before anything is loaded.

    Raises:
        ConfigError: the reward model is not fit (stage.gate=stop), a reward function cannot be found, or prompts and
            answers have no room.
    """
    stage = _stage(config)
    if stage.max_new_tokens >= stage.max_length:
        raise ConfigError(
            f"stage.max_new_tokens={stage.max_new_tokens} leaves no room for a prompt in stage.max_length="
            f"{stage.max_length}, which counts both"
        )
    if stage.use_vllm and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "stage.use_vllm=true: vLLM is not installed; pip install 'posttrain[vllm]' on a machine with a GPU"
        )
    _check_rewards(config)
    functions = _functions("stage.reward_functions", stage.reward_functions)
    eval_functions = _functions("stage.eval_reward_functions", stage.eval_reward_functions)
    for function in eval_functions:
        if inspect.iscoroutinefunction(function):
            raise ConfigError(f"stage.eval_reward_functions: {function.__name__} is async; only rewards may be")
    prepared = prepare_rows(config, tokenizer, read_prompts, encode_prompts, stage.max_new_tokens)
    taken = {name for row in prepared.train.rows for name in row.columns} & RESERVED_COLUMNS
    if taken:
        raise ConfigError(
            f"data.dataset_name={config.data.dataset_name}: column {min(taken)!r} has the name of something else that "
            "reward functions are handed; rename it"
        )
    found = len(prepared.train.rows)
    if found < stage.rollout_batch_size:
        warn(
            f"{found} prompts are fewer than stage.rollout_batch_size={stage.rollout_batch_size}: some are answered "
            "more than once in a rollout"
        )
    return PreparedPrompts(**vars(prepared), functions=functions, eval_functions=eval_functions)


def _stage(config: Config) -> PPOStage:
    assert isinstance(config.stage, PPOStage)
    return config.stage


def _check_rewards(config: Config) -> None:
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
    if parent is not None and parent["stage"] != "reward":
        raise ConfigError(f"stage.reward_model={stage.reward_model} is a run of stage={parent['stage']}, not of reward")
    verdict = read_object(
        folder.parent / "report_card.json", ("verdict", "reasons"), "train the reward model again with overwrite=true"
    )
    if verdict is None:
        warn(f"reward model {stage.reward_model}: no report card says whether it is fit to be optimised against")
        return
    said = verdict["verdict"] + (f" ({'; '.join(verdict['reasons'])})" if verdict["reasons"] else "")
    if verdict["verdict"] == FIT:
        say(f"reward model {stage.reward_model}: {said}")
    elif stage.gate == "warn":
        warn(f"reward model {stage.reward_model}: {said}; PPO will optimise its mistakes (stage.gate=warn)")
    else:
        raise ConfigError(
            f"stage.reward_model={stage.reward_model} is not fit to be optimised against: {said}. Train it on more or "
            "better pairs, or go on with stage.gate=warn"
        )


def _functions(key: str, specs: list[str]) -> list[rewards.RewardFunction]:
    found = [rewards.load_function(key, spec) for spec in specs]
    names = [function.__name__ for function in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"{key} names two functions alike ({', '.join(names)})")
    return found


def build(
    config: Config, prepared: Prepared, loaded: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path
) -> Any:
    """The trainer with its four roles: policy, critic, reference and reward."""
    from posttrain.rlhf.ppo import PPOConfig, PPOTrainer

    assert isinstance(prepared, PreparedPrompts)
    stage, rows = _stage(config), prepared.train.rows
    plan = schedule(stage, len(rows), process_state().num_processes)
    reward = roles.find_reward(config, tokenizer)
    arguments = trainer_arguments(config, folder, prepared.test is not None) | {
        "gradient_accumulation_steps": plan.accumulation,
        "include_num_input_tokens_seen": "no",  # TRL's generation counts them
        "reward_weights": stage.reward_weights,
    }
    scorer = roles.Scorer()
    functions = list(prepared.functions)
    if reward is not None:
        own: rewards.Encode = rewards.same_ids
        if not reward.same_tokenizer:
            encoder = ChatEncoder(reward.tokenizer, allow_special_tokens=True)
            own = rewards.encoded_anew(encoder, max_positions(reward.settings))
            say("reward model: has a tokenizer of its own; answers are decoded and put through its chat template")
        functions.insert(0, rewards.model_reward(scorer, own))
    path = str(loaded.config._name_or_path)
    trainer = PPOTrainer(
        rows=_inputs(rows, prepared.train.dataset["prompt_ids"]),
        plan=plan,
        reference=None if config.model.use_peft else load_causal_lm(config.model, tokenizer, path),
        value=lambda policy: roles.critic(config, policy, reward, tokenizer, path, scorer),
        args=trl_config(PPOConfig, arguments),
        model=loaded,
        reward_funcs=functions,
        train_dataset=prepared.train.dataset,
        eval_dataset=prepared.test.dataset if prepared.test else None,
        processing_class=tokenizer,
        peft_config=lora_config(config.model, loaded),
    )
    scorer.attach(trainer, reward, config)
    trainer.eval_functions = prepared.eval_functions
    roles.tell_roles(config, reward, path)
    return trainer


def _inputs(rows: Sequence[Any], prompt_ids: Sequence[list[int]]) -> list[dict[str, Any]]:
    """What TRL hands to reward functions: each prompt, its ids and its other columns, None where a row lacks one."""
    names = sorted({name for row in rows for name in row.columns})
    return [
        {name: row.columns.get(name) for name in names} | {"prompt": row.prompt, "prompt_ids": ids}
        for row, ids in zip(rows, prompt_ids, strict=True)
    ]


def preflight(work: Work) -> None:
    """See rlhf/preflight.py; then watch each rollout."""
    from posttrain.rlhf.preflight import check_start

    check_start(work.trainer)
    args, plan = work.trainer.args, work.trainer.plan
    steps = (
        args.max_steps
        if args.max_steps > 0
        else args.num_train_epochs * plan.rollouts_per_epoch * plan.steps_per_rollout
    )
    alarms = Alarms(_stage(work.config), planned=math.ceil(steps / plan.steps_per_rollout))
    for entry in read_lines(work.folder.metrics):
        if "kl_error" in entry:  # a rollout before a resume
            alarms(entry)
    file = work.folder.rollouts

    def on_rollout(rollout: "Rollout") -> None:
        if is_main_process():
            step = work.trainer.state.global_step
            with writing(file), file.open("a", encoding="utf-8") as lines:
                for sample in rollout.samples[:SAMPLES]:
                    line = {"step": step, "rollout": rollout.number, **sample}
                    lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        for alarm in alarms(rollout.numbers):
            warn(f"rollout {rollout.number + 1}: {alarm}")

    work.trainer.on_rollout = on_rollout
    work.trainer.judge_now = lambda: held_out(work)[0]


def held_out(work: Work) -> tuple[dict[str, float], list[Answer]]:
    """Numbers of answers that the policy samples to held-out prompts; the generators of the run are left as they were.

    KL is exact at each position of the sampled answers; `gold/<name>` is each of stage.eval_reward_functions,
    `gold` their sum.
    """
    import torch

    trainer, stage, encoder = work.trainer, _stage(work.config), work.prepared.encoder
    rows = list(work.panel)
    if not rows:
        return {}, []
    policy = trainer.trained()
    with trainer.seeded(f"held out {work.config.seed}"), trainer.accelerator.autocast(), torch.no_grad():
        made = generate(policy, encoder, rows, work.new_tokens, temperature=stage.temperature)
        kl = completion_kl(
            policy, trainer.reference, made.prompts, made.completions, encoder.tokenizer.pad_token_id, 16
        )
    texts = [str(text) for text in encoder.tokenizer.batch_decode(made.completions, skip_special_tokens=True)]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    inputs = _inputs(rows, made.prompts)
    prompts = [row.prompt for row in rows]
    per_function = trainer.rewards_of(inputs, prompts, messages, made.completions)
    score = float((per_function.cpu() * trainer.reward_weights).nansum(1).mean())
    found = {
        "reward": score,
        "kl": float(kl.mean()),
        "response_length": fmean(len(completion) for completion in made.completions),
        "ended_by_eos": fmean(made.ended),
    }
    columns = {name: [row[name] for row in inputs] for name in inputs[0] if name != "prompt"}
    golds = {
        function.__name__: fmean(
            value
            for value in function(prompts=prompts, completions=messages, completion_ids=made.completions, **columns)
            if value is not None
        )
        for function in work.trainer.eval_functions
    }
    if golds:
        found |= {"gold": sum(golds.values())} | {f"{GOLD}{name}": value for name, value in golds.items()}
    found["penalised_reward"] = score - stage.kl_coef * found["kl"]
    return found, [Answer(text, ended) for text, ended in zip(texts, made.ended, strict=True)]


def judge(work: Work) -> Judgement:
    """Reward, gold reward, KL and length of sampled answers to held-out prompts, and the prompt panel answered."""
    trainer = work.trainer
    found, _ = held_out(work)
    if trainer.state.global_step == 0:  # where the curves begin
        trainer.log({f"eval_{name}": value for name, value in found.items()})
    with trainer.accelerator.autocast():
        answers = answer(trainer.trained(), work.prepared.encoder, work.panel[:ANSWERED], work.new_tokens)
    return Judgement(found, answers)


STAGE = Stage(
    prepare=prepare,
    load=load_policy,
    build=build,
    preflight=preflight,
    judge=judge,
    objective="penalised_reward",
    shown={
        "reward": "reward of sampled answers, held out",
        "gold": "gold reward (stage.eval_reward_functions)",
        "kl": "KL from the reference (nats per answer)",
        "penalised_reward": "reward less kl_coef × KL",
        "response_length": "response length (tokens)",
        "ended_by_eos": "answers ended by the model itself",
    },
    swept={
        "reward": "reward",
        "gold": "gold reward",
        "kl": "KL from reference",
        "response_length": "response length",
        "ended_by_eos": "ended by EOS",
    },
    draw=lambda folder: draw_curves(folder.metrics, folder.curves),
)
