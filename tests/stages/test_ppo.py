"""PPO through the real entry point: its roles, its rewards, every hyperparameter, what it tells and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import LORA, QLORA, REWARD, SHORT_PPO, Posttrain, logged, manifest, once, read_rows, write_rows
from safetensors.torch import load_file

PPO = Path("outputs/demo/ppo")
BF16 = "precision=bf16"


@pytest.fixture
def models(
    posttrain: Posttrain, rows: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., None]:
    """Put outputs/demo/sft and outputs/demo/reward there, of a few steps each, trained once for each kind."""
    pairs = [{"prompt": f"Say {n}.", "chosen": f"{n} it is.", "rejected": f"No {n} for you."} for n in range(40)]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    short = ("trainer.max_steps=3", "stage.learning_rate=1e-2", "stage.warmup_steps=0", "stage.max_length=64")

    def put(*more: str) -> None:
        def make(folder: Path) -> None:
            run = (*short, f"output_dir={folder}")
            done = posttrain(f"data.dataset_name={rows}", *run)
            assert done.code == 0, done
            done = posttrain("stage=reward", "data.dataset_name=pairs.jsonl", "data.test_size=8", *run, *more)
            assert done.code == 0, done

        shutil.copytree(once(tmp_path_factory, f"models-{len(more)}", make), "outputs")

    return put


ROLES = {
    "full": ((), (), "4 models in memory", "the reward model, all weights"),
    "lora-shared": (LORA, LORA, "1 model in memory", "the reward model, an adapter on the same base"),
    "lora-shared-bf16": (LORA, (*LORA, BF16), "1 model in memory", "the reward model, an adapter on the same base"),
    "lora-separate": ((), LORA, "2 models in memory", "an adapter on the same base"),
    "qlora": (QLORA, QLORA, "1 model in memory", "adapter"),
}


@pytest.mark.parametrize(("reward", "ppo", "held", "critic"), ROLES.values(), ids=ROLES)
def test_ppo_takes_both_models_of_the_run(
    posttrain: Posttrain,
    models: Callable[..., None],
    prompts: str,
    reward: tuple[str, ...],
    ppo: tuple[str, ...],
    held: str,
    critic: str,
) -> None:
    models(*reward)
    done = posttrain("stage=ppo", prompts, *SHORT_PPO, "stage.gate=warn", *ppo)
    assert done.code == 0, done
    assert "model: outputs/demo/sft (the sft model of this run)" in done.out
    assert held in done.out
    assert (
        f"critic = {critic}" in done.out.replace("outputs/demo/sft/model, an adapter", "an adapter")
        or critic in done.out
    )
    assert "its mistakes will be optimised as well (stage.gate=warn)" in done.out
    assert "step 0: probability ratio within 0.0e+00 of 1, KL within" in done.out
    inputs = manifest(PPO)["inputs"]
    assert inputs["model"]["stage"] == "sft"
    assert inputs["reward_model"]["stage"] == "reward"
    assert (
        inputs["reward_model"]["weights"]["model.safetensors"]
        == manifest("outputs/demo/reward")["weights"]["model.safetensors"]
    )
    metrics = manifest(PPO)["metrics"]
    assert metrics["kl_before"] == pytest.approx(0, abs=1e-6)
    assert metrics["kl"] > 0
    rollouts = [line for line in logged(PPO) if "reward_std" in line]
    assert len(rollouts) == 4  # 12 prompts are one rollout and a half, twice
    assert rollouts[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert rollouts[0]["kl_k3"] == pytest.approx(0, abs=1e-6)
    for name in ("entropy", "response_length", "ended_by_eos", "explained_variance", "kl_coef"):
        assert all(name in line for line in rollouts), name
    for name in ("policy_loss", "value_loss", "clip_fraction", "approx_kl"):
        assert any(name in line for line in logged(PPO)), name
    samples = read_rows(PPO / "rollouts.jsonl")
    assert {sample["rollout"] for sample in samples} == {0, 1, 2, 3}
    assert {"prompt", "answer", "reward", "kl", "tokens", "ended"} <= samples[0].keys()
    for sample in samples:
        assert len(sample["trace"]) == sample["tokens"]
        assert sum(ratio for _, ratio, _ in sample["trace"]) == pytest.approx(sample["kl"], abs=1e-3)
    assert any(advantage for *_, advantage in samples[0]["trace"])
    assert Path("outputs/demo/ppo/curves.svg").is_file()


@pytest.mark.parametrize("more", [(), pytest.param(LORA, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_continuous_batching_leaves_the_weights_in_float32(
    posttrain: Posttrain, prompts: str, more: tuple[str, ...]
) -> None:
    small = "+trainer.transformers_continuous_batching_config={num_blocks: 8, max_batch_tokens: 64}"
    batching = (BF16, "stage.use_transformers_continuous_batching=true", small)
    done = posttrain("stage=ppo", prompts, *SHORT_PPO, REWARD, *batching, *more)
    assert done.code == 0, done
    assert "ContinuousBatchingLogger" not in done.err
    trained = load_file(PPO / ("adapter/adapter_model.safetensors" if more else "model/model.safetensors"))
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert not any(torch.equal(weight, weight.bfloat16().float()) for weight in trained.values() if weight.any())


def test_an_adapter_scores_as_the_merged_reward_model(
    posttrain: Posttrain, models: Callable[..., None], prompts: str
) -> None:
    """The same run with the reward model as an adapter and as a model of its own: the same rewards."""
    models(*LORA)
    found = []
    for run in ("shared", "separate"):
        if run == "separate":
            for file in Path("outputs/demo/reward/adapter").iterdir():
                file.unlink()
        inputs = ("model.model_name_or_path=outputs/demo/sft", "stage.reward_model=outputs/demo/reward")
        done = posttrain("stage=ppo", prompts, *SHORT_PPO, *LORA, *inputs, "stage.gate=warn", f"run_name={run}")
        assert done.code == 0, done
        assert ("1 model in memory" if run == "shared" else "2 models in memory") in done.out
        found.append(next(line["reward"] for line in logged(f"outputs/{run}/ppo") if "reward_std" in line))
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert abs(found[0]) > 1e-3


def test_functions_are_told_before_they_are_run_and_see_all_columns(posttrain: Posttrain, prompts: str) -> None:
    functions = "stage.reward_functions=[my_rewards.even,my_rewards.py:wanted,my_rewards.sometimes,my_rewards.slow]"
    done = posttrain("stage=ppo", prompts, *SHORT_PPO, functions, "stage.reward_weights=[1,10,100,0]")
    assert done.code == 0, done
    assert "stage.reward_functions: even from " in done.out
    assert f"stage.reward_functions: wanted from {Path.cwd()}/my_rewards.py" in done.out
    assert "ppo/base, all weights, with a new head that begins at 0" in done.out
    samples = read_rows(PPO / "rollouts.jsonl")
    for sample in samples:
        asked = sample["prompt"][-1]["content"]
        assert sample["wanted"] == float(int(asked.strip(".").split()[-1]) % 2)
        assert sample["slow"] == 0.5
        applies = 100.0 if "1" in asked else 0.0
        assert sample["reward"] == pytest.approx(sample["even"] + 10 * sample["wanted"] + applies)
    assert any(line.get("reward/even") is not None for line in logged(PPO))


def test_the_reward_rises_and_the_reference_stays(posttrain: Posttrain, prompts: str) -> None:
    write_rows(Path("prompts.jsonl"), [{"prompt": f"Say {'very ' * (n % 4)}{n}."} for n in range(24)])
    done = posttrain(
        "stage=ppo",
        prompts,
        *SHORT_PPO,
        REWARD,
        "stage.num_epochs=8",
        "stage.learning_rate=1e-2",
        "stage.kl_coef=0",
        "stage.value_learning_rate=1e-2",
        "stage.missing_eos_penalty=0",
        "stage.eval_reward_functions=[my_rewards.odd,my_rewards.constant]",
        "data.test_size=8",
    )
    assert done.code == 0, done
    metrics = manifest(PPO)["metrics"]
    assert metrics["reward"] > metrics["reward_before"] + 1
    # without a price, KL is measured on held-out completions alone
    assert metrics["kl"] > 1
    rollouts = [line for line in logged(PPO) if "shaped_reward" in line]
    assert rollouts
    assert not {"kl", "kl_k3", "kl_coef"} & {key for line in rollouts for key in line}
    assert {sample["kl"] for sample in read_rows(PPO / "rollouts.jsonl")} == {None}
    # and what the reward has risen at the cost of is told once, with remedies
    assert metrics["gold/odd"] == -metrics["reward"]
    assert (metrics["reward_better"], metrics["gold/odd_worse"], metrics["gold/constant_worse"]) == (8, 8, 0)
    assert metrics["reward_low_before"] < metrics["reward_before"] < metrics["reward_high_before"]
    assert done.out.count("warning over-optimisation on the same held-out prompts: reward rose (8 better") == 1
    assert "; odd fell (0 better, 8 worse, p = 0.0078): -3." in done.out
    assert "stage.kl_coef=0.1 holds on to the reference" in done.out
    assert "trainer.metric_for_best_model=eval_gold/odd trainer.save_steps=0.2" in done.out
    assert "rose (8 better, 0 worse, p = 0.0078)" in done.out
    assert "no difference seen (0 better, 0 worse, p = 1)" in done.out
    assert ">odd<" in (PPO / "curves.svg").read_text()


WRONG = {
    "nan": ("my_rewards.broken", 1, "reward function broken gave nan, which is not a finite number"),
    "inf": ("my_rewards.infinite", 1, "reward function infinite gave inf"),
    "too large for sums": ("my_rewards.huge", 1, "huge gave a reward of 1e+38 at step 0"),
    "too few": ("my_rewards.few", 1, "reward function few gave 1 rewards for 4 completions"),
    "no **columns": ("my_rewards.narrow", 1, "and more (**columns), and returns a list"),
    "sys.exit": ("my_rewards.leaves", 1, "reward function leaves failed: SystemExit: 0 (my_rewards.py:"),
    "sys.exit in a generator": ("my_rewards.leaves_later", 1, "reward function leaves_later failed: SystemExit: 0"),
    "sys.exit at import": (
        "exits.py:even",
        2,
        "exits.py:even cannot be imported: SystemExit: 0",
    ),
    "nothing applies": ("my_rewards.sometimes", 1, "the reward is not a finite number for"),
    "no function": ("my_rewards.evn", 2, "no function evn in"),
    "no module": ("my_reward.even", 2, "no module named my_reward"),
    "no file": ("other.py:even", 2, "no file other.py"),
    "no name": ("even", 2, "must be package.module.function or path/to/file.py:function"),
}


@pytest.mark.parametrize(("function", "code", "told"), WRONG.values(), ids=WRONG)
def test_a_wrong_reward_stops_the_run(posttrain: Posttrain, prompts: str, function: str, code: int, told: str) -> None:
    Path("exits.py").write_text("import sys\nsys.exit(0)\n")
    done = posttrain("stage=ppo", prompts, *SHORT_PPO, f"stage.reward_functions=[{function}]")
    assert done.code == code, done
    assert told in done.err
    assert not Path("outputs/demo/ppo/posttrain.json").exists()


def test_a_constant_reward_is_told(posttrain: Posttrain, prompts: str) -> None:
    done = posttrain("stage=ppo", prompts, *SHORT_PPO, "stage.reward_functions=[my_rewards.constant]")
    assert done.code == 0, done
    assert "all completions of a rollout got the same reward (3)" in done.out
    assert done.out.count("constant from ") == 1  # the file is named before it is imported, and once


def test_ppo_without_a_reward_or_with_a_wrong_one_is_refused(
    posttrain: Posttrain, models: Callable[..., None], prompts: str
) -> None:
    done = posttrain("stage=ppo", prompts, *SHORT_PPO)
    assert done.code == 2, done
    assert "stage=ppo needs a reward, and outputs/demo/reward is not there" in done.err
    models()
    done = posttrain("stage=ppo", prompts, *SHORT_PPO)
    assert done.code == 2, done
    assert "is not good enough to optimise against" in done.err
    assert "go on with stage.gate=warn" in done.err
    done = posttrain("stage=ppo", prompts, *SHORT_PPO, "stage.reward_model=outputs/demo/sft")
    assert done.code == 2, done
    assert "stage.reward_model=outputs/demo/sft is a run of stage=sft, not of reward" in done.err
    done = posttrain("stage=ppo", prompts, *SHORT_PPO, "stage.reward_model=outputs/demo/sft/model/")
    assert done.code == 2, done
    done = posttrain("stage=ppo", prompts, *SHORT_PPO, "stage.reward_model=./nowhere")
    assert done.code == 2, done
    assert "stage.reward_model=./nowhere: no such folder" in done.err
    done = posttrain("stage=ppo", prompts, *SHORT_PPO, "stage.gate=warn", "stage.reward_weights=[1,2]")
    assert done.code == 2, done
    assert "stage.reward_weights has 2 numbers for 1 rewards" in done.err


REFUSED = {
    "no room for an episode": (("stage.micro_batch_tokens=63",), "no room for an episode of stage.max_length=64"),
    "a critic that cannot stop": (("stage.critic_stop_gradient=true",), "is read by stage.critic=head only"),
    "no room": (("stage.max_new_tokens=64",), "leaves no room for a prompt in stage.max_length=64"),
    "uneven": (("stage.rollout_batch_size=9",), "stage.rollout_batch_size=9 must be a multiple of"),
    "prompts too long": (("stage.max_length=10",), "Raise stage.max_length=10"),
    "top_k": (("trainer.top_k=5",), "trainer.top_k cannot be set: completions are sampled"),
    "beta": (("trainer.beta=0.1",), "trainer.beta cannot be set: set stage.kl_coef"),
    "epsilon": (("trainer.epsilon=0.1",), "trainer.epsilon repeats stage.clip_ratio"),
    "epsilon_high": (("trainer.epsilon_high=0.1",), "trainer.epsilon_high repeats stage.clip_ratio_high"),
    "fp16": (("stage.target_kl=0.1", "precision=fp16"), "skips optimizer steps, which DeepSpeed and fp16 cannot"),
    "accumulation": (("trainer.gradient_accumulation_steps=2",), "it follows from stage.rollout_batch_size"),
    "estimator": (("stage.kl_estimator=k2",), "stage.kl_estimator=k2 is not one of k1, k3"),
}


@pytest.mark.parametrize(("more", "told"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused(posttrain: Posttrain, prompts: str, more: tuple[str, ...], told: str) -> None:
    done = posttrain("stage=ppo", prompts, *SHORT_PPO, REWARD, *more)
    assert done.code == 2, done
    assert told in done.err


def test_a_column_named_like_an_argument_is_refused(posttrain: Posttrain, prompts: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Say {n}.", "completions": "x"} for n in range(16)])
    done = posttrain("stage=ppo", prompts, *SHORT_PPO, REWARD)
    assert done.code == 2, done
    assert "column 'completions' has the name of something else that reward functions are handed" in done.err
    done = posttrain("stage=ppo", prompts, *SHORT_PPO, REWARD, "stage.eval_reward_functions=[my_rewards.slow]")
    assert done.code == 2, done
    assert "slow is async; only rewards may be" in done.err


def test_long_prompts_are_counted_and_few_ones_told(posttrain: Posttrain, prompts: str) -> None:
    done = posttrain("stage=ppo", prompts, *SHORT_PPO, REWARD, "stage.max_length=22", "stage.rollout_batch_size=16")
    assert done.code == 0, done
    assert "their prompt alone fills stage.max_length=22, of which stage.max_new_tokens=6 are kept free" in done.out
    assert (
        "prompts are fewer than the 16 of a rollout (stage.rollout_batch_size=16): some are taken more than once"
        in done.out
    )
    assert manifest(PPO)["metrics"]["steps"] > 0


def test_a_dry_run_shows_the_plan(posttrain: Posttrain, prompts: str) -> None:
    done = posttrain("stage=ppo", prompts, *SHORT_PPO, REWARD, "dry_run=true")
    assert done.code == 0, done
    assert "rollout: 8 prompts completed, learned from in 2 epochs of 2 updates" in done.out
    assert "batch: 4 per device × 1 accumulation × 1 device = 4 episodes per update" in done.out
    assert "steps: 16 (2 epochs of 8)" in done.out
    assert not Path("outputs").exists()


def test_a_ceiling_stops_the_run(posttrain: Posttrain, prompts: str) -> None:
    more = ("stage.learning_rate=1e-2", "stage.kl_ceiling=0.01", "stage.kl_coef=0")
    done = posttrain("stage=ppo", prompts, *SHORT_PPO, REWARD, *more)
    assert done.code == 1, done
    assert "above stage.kl_ceiling=0.01" in done.err
    assert "stage.kl_coef=" in done.err


# Each hyperparameter, flipped, must change what is computed: (base, flip). What it changes is looked at as a whole:
# the numbers of all rollouts and updates.
FAST = ("stage.learning_rate=1e-2", "stage.value_learning_rate=1e-2")
ADAPTIVE = ("stage.kl_horizon=10", "stage.kl_controller=adaptive", "stage.num_epochs=2")
FLIPS = {
    "learning_rate": ((), "stage.learning_rate=2e-3"),
    "temperature": ((), "stage.temperature=0.5"),
    "ppo_epochs": ((), "stage.ppo_epochs=3"),
    "num_mini_batches": ((), "stage.num_mini_batches=1"),
    "rollout_batch_size": ((), "stage.rollout_batch_size=16"),
    "max_new_tokens": ((), "stage.max_new_tokens=5"),
    "clip_ratio": (FAST, "stage.clip_ratio=0.01"),
    "clip_ratio_high": (FAST, "stage.clip_ratio_high=0.01"),
    "dual_clip": (FAST, "stage.dual_clip=1.0001"),
    "value_lam": ((), "stage.value_lam=0.1"),
    "entropy_coef": ((), "stage.entropy_coef=1.0"),
    "gamma": ((), "stage.gamma=0.5"),
    "lam": ((), "stage.lam=0.1"),
    "whiten_advantages": ((), "stage.whiten_advantages=false"),
    "whiten_rewards": ((), "stage.whiten_rewards=true"),
    "vf_coef": ((), "stage.vf_coef=0.9"),
    "cliprange_value": (FAST, "stage.cliprange_value=null"),
    "value_learning_rate": ((), "stage.value_learning_rate=1e-1"),
    "critic": ((), "stage.critic=head"),
    "critic_stop_gradient": (("stage.critic=head",), "stage.critic_stop_gradient=true"),
    "critic_warmup_steps": ((), "stage.critic_warmup_steps=4"),
    "kl_coef": (FAST, "stage.kl_coef=5"),
    "kl_estimator": (FAST, "stage.kl_estimator=k3"),
    "kl_controller": (ADAPTIVE, "stage.kl_controller=fixed"),
    "kl_target": (ADAPTIVE, "stage.kl_target=1e-4"),
    "kl_horizon": (ADAPTIVE, "stage.kl_horizon=10000"),
    "reward_scale": (("stage.whiten_advantages=false",), "stage.reward_scale=10"),
    "reward_clip": ((), "stage.reward_clip=0.5"),
    "length_penalty": ((), "stage.length_penalty=1"),
    "missing_eos_penalty": ((), "stage.missing_eos_penalty=0"),
    "reward_weights": (("stage.whiten_advantages=false",), "stage.reward_weights=[3]"),
    "seed": ((), "seed=7"),
}


BASES: dict[tuple[str, ...], str] = {}  # runs without a flip, which several flips are compared with


@pytest.mark.parametrize(("base", "flip"), FLIPS.values(), ids=FLIPS)
def test_every_hyperparameter_reaches_the_computation(
    posttrain: Posttrain, prompts: str, base: tuple[str, ...], flip: str
) -> None:

    def numbers(name: str, *more: str) -> str:
        settings = (*SHORT_PPO, REWARD, "stage.num_epochs=1", "data.test_size=0", *base, *more)
        done = posttrain("stage=ppo", prompts, *settings, f"run_name={name}")
        assert done.code == 0, done
        return json.dumps(
            [line | {"step_time": 0, "time": ""} for line in logged(f"outputs/{name}/ppo") if "train_loss" not in line]
        )

    if base not in BASES:
        BASES[base] = numbers("base")
    if flip == "seed=7":
        assert numbers("again") == BASES[base]  # the same seed: the same numbers to the last digit
    assert numbers("flip", flip) != BASES[base]


def test_instruction_rows_are_learned_beside(posttrain: Posttrain, prompts: str, rows: Path) -> None:
    """The first update's loss is that of transformers on the rows that seed and update give; then it falls."""
    from transformers import AutoModelForCausalLM

    from posttrain import configure
    from posttrain.data.encode import labels_of
    from posttrain.rlhf.rollout_plan import RolloutPlan, prompts_of_rollout
    from posttrain.train import prepared

    ptx = (
        f"data.ptx=[{rows},{{name: more.jsonl, columns: {{text: text}}}}]",
        "stage.ptx_coef=2",
        "stage.temperature=0.7",
        "stage.batch_size=2",
    )
    write_rows(Path("more.jsonl"), [{"text": "One and two are three."}])
    words = (
        "stage=ppo",
        prompts,
        *SHORT_PPO,
        REWARD,
        *ptx,
        "stage.num_epochs=1",
        "data.max_rows=20",
        "data.test_size=0",
    )
    done = posttrain(*words)
    assert done.code == 0, done
    assert manifest(PPO)["data"]["counts"]["ptx"]["kept"] == 21
    assert manifest(PPO)["data"]["rows_of"]["more.jsonl"] == {"train": 0, "test": 0, "ptx": 1}
    losses = [line["ptx_loss"] for line in logged(PPO) if "ptx_loss" in line]
    assert losses[-1] < losses[0] - 1
    dataset = prepared(configure(*words, f"model.model_name_or_path={PPO}/base")).prepared.ptx.dataset
    base = AutoModelForCausalLM.from_pretrained(PPO / "base")
    summed, tokens = 0.0, 0
    base.requires_grad_(False)
    for row in dataset.select(prompts_of_rollout(RolloutPlan(21, 4, 4, 1, 1, 1, 4, 6), 42, 0)):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([labels_of(row["input_ids"], row["spans"])])
        count = int((labels[:, 1:] != -100).sum())
        summed, tokens = summed + float(base(ids, labels=labels).loss) * count, tokens + count
    assert losses[0] == pytest.approx(summed / tokens, rel=1e-5)
    write_rows(rows, [{"instruction": "What is new?", "response": "This."}])
    changed = posttrain(*words)
    assert changed.code == 2, changed
    assert "or the content of one has changed" in changed.err


def test_updates_beyond_the_target_kl_are_skipped(posttrain: Posttrain, prompts: str) -> None:
    """A rollout's first update has a KL of 0, the second has not: those left move neither weights nor moments."""
    saves = ("trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.save_total_limit=6", "trainer.max_steps=6")
    more = ("stage.target_kl=1e-9", "stage.batch_size=2")
    done = posttrain("stage=ppo", prompts, *SHORT_PPO, REWARD, *saves, *more)
    assert done.code == 0, done
    updates = [line for line in logged(PPO) if "skipped_updates" in line]
    assert [line["skipped_updates"] for line in updates] == [0, 0, 1, 1, 0, 0]
    assert [line.get("approx_kl", 0) > 0 for line in updates] == [False, True, False, False, False, True]
    weights = [load_file(PPO / f"checkpoint-{step}/model.safetensors") for step in range(1, 7)]
    states = [torch.load(PPO / f"checkpoint-{step}/optimizer.pt")["state"] for step in range(1, 7)]
    for step, skipped in enumerate((False, True, True, False, False), start=1):
        moved = any(not torch.equal(weights[step - 1][name], weights[step][name]) for name in weights[0])
        stepped = any(
            not torch.equal(states[step - 1][weight][name], states[step][weight][name])
            for weight in states[0]
            for name in ("step", "exp_avg", "exp_avg_sq")
        )
        assert moved == stepped == (not skipped), step


def test_the_critic_warms_up_alone(posttrain: Posttrain, prompts: str) -> None:
    done = posttrain(
        "stage=ppo", prompts, *SHORT_PPO, REWARD, "stage.critic_warmup_steps=1000", "stage.learning_rate=1e-2"
    )
    assert done.code == 0, done
    rollouts = [line for line in logged(PPO) if "reward_std" in line]
    assert all(line["kl"] == 0 for line in rollouts)  # the policy has not moved
    assert rollouts[-1]["explained_variance"] != 0  # the critic has


def test_answers_of_several_turns_and_a_reward_model_with_another_tokenizer(
    posttrain: Posttrain, models: Callable[..., None], tmp_path: Path
) -> None:
    from tokenizers_for_tests import llama_like
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = llama_like()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForSequenceClassification(config)
    model.save_pretrained("other")
    tokenizer.save_pretrained("other")
    turns = [
        {"role": "user", "content": "Say one."},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "And two?"},
    ]
    rows = [{"prompt": [*turns[:-1], {"role": "user", "content": f"And {n}?"}]} for n in range(12)]
    write_rows(tmp_path / "turns.jsonl", rows)
    models()
    more = ("data.dataset_name=turns.jsonl", "stage.reward_model=./other", "stage.max_length=100")
    done = posttrain("stage=ppo", *SHORT_PPO, *more)
    assert done.code == 0, done
    assert "no report_card.json found: quality unknown" in done.out
    assert "has a tokenizer of its own; completions are decoded and put through its chat template" in done.out
    assert "the reward model has 24 positions" in done.out
    assert "critic = outputs/demo/sft/model, all weights" in done.out
    sample = read_rows(PPO / "rollouts.jsonl")[0]
    text = tokenizer.apply_chat_template(
        [*sample["prompt"], {"role": "assistant", "content": sample["answer"]}], tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False).input_ids[-24:]
    with torch.no_grad():
        expected = float(model.eval()(torch.tensor([ids])).logits[0, 0])
    assert sample["reward"] == pytest.approx(expected, abs=1e-4)
