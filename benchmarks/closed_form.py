"""Is the optimum reached? Reward modelling, DPO and PPO on a problem whose every answer can be enumerated.

    python benchmarks/closed_form.py [folder]

Three prompts have five answers each, with rewards r = ln k for whole numbers k, so that pairs can be written down
in exact Bradley-Terry proportion (k_a of k_a + k_b times a wins) and no sampling noise limits the result. The
reference is a random model. Trained through the real entry point,
- DPO must reach pi*(y|x) proportional to pi_ref(y|x) exp(r(x,y) / beta)   (Rafailov et al. 2023, equation 4), and
- the reward model must recover r up to a constant for each prompt, and
- PPO with kl_coef = beta must reach the pi* over everything that two tokens can say (111 sequences; r = -2 for those
  that are no answer): J = E[r] - beta KL(pi||pi_ref) falls short of J* by exactly beta KL(pi||pi*). With a critic
  that is a head on the policy, too, with forwards bounded by their tokens in two processes, with LoRA,
  with groups of completions in place of a critic (stage=grpo, its KL in the reward, nothing divided by a spread),
  and with a reward model trained with LoRA as the third adapter of one base, whose own scores are then the r.
Prints the distances, and draws the measured (KL, reward) points on the theoretical frontiers.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


BETAS = (0.25, 0.5, 1.0)
PROMPTS = ("river", "stone", "cloud")
ANSWERS = ("one", "two", "three", "four", "five")
# exp(reward) of each answer, another order for each prompt
ODDS = {"river": (1, 2, 3, 5, 8), "stone": (8, 1, 5, 2, 3), "cloud": (3, 8, 2, 1, 5)}
KL_LIMIT = 0.02  # nats
CORRELATION_LIMIT = 0.99
DPO = ["stage=dpo", "stage.learning_rate=5e-3", "stage.num_epochs=400"]
J_LIMIT = 1e-3
PPO_KL_LIMIT = 2e-3  # nats
NO_ANSWER = -2.0  # the reward of what is none of the answers
PPO = [
    *("stage=ppo", "stage.max_new_tokens=2", "stage.rollout_batch_size=384", "stage.num_mini_batches=1"),
    *("stage.ppo_epochs=4", "stage.num_epochs=300", "stage.lam=1.0", "stage.missing_eos_penalty=0"),
    *("stage.whiten_advantages=false", "stage.cliprange_value=null", "stage.vf_coef=1.0", "stage.batch_size=384"),
]
GROUP_LOSSES = ("dapo", "dr_grpo", "rloo")  # grpo lets a token of a shorter completion count for more
GRPO = [
    *("stage=grpo", "stage.max_new_tokens=2", "stage.rollout_batch_size=384", "stage.num_generations=128"),
    *("stage.batch_size=384", "stage.ppo_epochs=4", "stage.num_epochs=300", "stage.missing_eos_penalty=0"),
    *("stage.scale_rewards=none", "stage.kl_in_reward=true", "stage.learning_rate=1e-3", "stage.kl_coef=0.5"),
]
LORA = ["model.use_peft=true"]
REWARD = ["stage=reward", "stage.learning_rate=5e-3", "stage.num_epochs=200"]
SETTINGS = ["stage.max_length=12", "data.test_size=0", "trainer.save_strategy=no", "trainer.eval_strategy=no"]


def write_problem(folder: Path) -> None:
    """The pairs, and a random reference model with a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    rows = [
        {"prompt": prompt, "chosen": ANSWERS[better], "rejected": ANSWERS[worse]}
        for prompt, odds in ODDS.items()
        for better in range(len(ANSWERS))
        for worse in range(len(ANSWERS))
        for _ in range(odds[better])
        if better != worse
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    table = {
        prompt: {word: math.log(k) for word, k in zip(ANSWERS, odds, strict=True)} for prompt, odds in ODDS.items()
    }
    (folder / "table.py").write_text(
        f"TABLE = {table!r}\n\n\n"
        "def reward(prompts, completions, completion_ids, **columns):\n"
        "    found = []\n"
        "    for prompt, completion, ids in zip(prompts, completions, completion_ids):\n"
        "        ended = len(ids) == 2 and ids[-1] == 0\n"
        f"        word = completion[0]['content'] if ended else None\n"
        f"        found.append(TABLE[prompt[-1]['content']].get(word, {NO_ANSWER}))\n"
        "    return found\n"
    )
    words = ["<end>", "<pad>", "<unknown>", *PROMPTS, *ANSWERS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<unknown>"
    )
    fast.chat_template = (
        "{% for message in messages %}{{ message['content'] }}"
        "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(words),
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "reference")
    fast.save_pretrained(folder / "reference")


PAIRS = f"stage.batch_size={len(PROMPTS) * 4 * sum(ODDS['river'])}"


def train(folder: Path, *arguments: str, data: str = "pairs.jsonl") -> None:
    command = [sys.executable, "-m", "posttrain.run", *arguments, *SETTINGS, f"output_dir={folder / 'outputs'}"]
    command += [f"model.model_name_or_path={folder / 'reference'}", f"data.dataset_name={folder / data}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")


def distributions(model_folder: Path) -> list[list[float]]:
    """pi(answer | prompt), for each prompt, over the enumerated answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from posttrain.models.generate import completion_logps

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    completions = [[*tokenizer(answer).input_ids, tokenizer.eos_token_id] for answer in ANSWERS]
    found = []
    for prompt in PROMPTS:
        prompts = [tokenizer(prompt).input_ids] * len(ANSWERS)
        logps = completion_logps(model, prompts, completions, tokenizer.pad_token_id)
        found.append(logps.double().softmax(0).tolist())
    return found


def optimum(reference: list[list[float]], beta: float) -> list[list[float]]:
    """pi* for each prompt."""
    found = []
    for prompt, row in zip(PROMPTS, reference, strict=True):
        weights = [share * odds ** (1 / beta) for share, odds in zip(row, ODDS[prompt], strict=True)]
        found.append([weight / sum(weights) for weight in weights])
    return found


def kl(one: list[list[float]], other: list[list[float]]) -> float:
    """KL(one || other) in nats, mean over prompts."""
    parts = [
        sum(p * math.log(p / q) for p, q in zip(a, b, strict=True) if p > 0) for a, b in zip(one, other, strict=True)
    ]
    return sum(parts) / len(parts)


def reward(policy: list[list[float]]) -> float:
    """The expected reward, mean over prompts."""
    parts = [
        sum(p * math.log(odds) for p, odds in zip(row, ODDS[prompt], strict=True))
        for prompt, row in zip(PROMPTS, policy, strict=True)
    ]
    return sum(parts) / len(parts)


def reward_model_scores(model_folder: Path) -> list[list[float]]:
    """Scores of all answers, for each prompt less its mean."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from posttrain.models.generate import scores

    model = AutoModelForSequenceClassification.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    found = []
    for prompt in PROMPTS:
        rows = [
            tokenizer(prompt).input_ids + tokenizer(answer).input_ids + [tokenizer.eos_token_id] for answer in ANSWERS
        ]
        row = scores(model, rows, tokenizer.pad_token_id)
        found.append([score - sum(row) / len(row) for score in row])
    return found


def prove(folder: Path) -> dict[str, Any]:
    """Train every stage and measure how far it ends from what it must be."""
    from posttrain.metrics.report_card import correlation

    folder.mkdir(parents=True, exist_ok=True)
    write_problem(folder)
    reference = distributions(folder / "reference")
    train(folder, "-m", *DPO, PAIRS, f"stage.beta={','.join(map(str, BETAS))}")
    points = []
    for beta in BETAS:
        policy = distributions(folder / f"outputs/demo/dpo/stage.beta={beta}/model")
        best = optimum(reference, beta)
        points.append(
            {
                "beta": beta,
                "kl_to_optimum_before": kl(best, reference),
                "kl_to_optimum": kl(best, policy),
                "kl": kl(policy, reference),
                "reward": reward(policy),
            }
        )
    train(folder, *REWARD, PAIRS)
    scored = reward_model_scores(folder / "outputs/demo/reward/model")
    wanted = [[math.log(odds) for odds in ODDS[prompt]] for prompt in PROMPTS]
    centred = [[value - sum(row) / len(row) for value in row] for row in wanted]
    flat = [[value for row in rows for value in row] for rows in (scored, centred)]
    order = all(
        (row[a] > row[b]) == (true[a] > true[b])
        for row, true in zip(scored, wanted, strict=True)
        for a in range(len(ANSWERS))
        for b in range(a)
    )
    frontier = [
        {"kl": kl(best, reference), "reward": reward(best)}
        for best in (optimum(reference, 10 ** (exponent / 20)) for exponent in range(-16, 31))
    ]
    start = {"kl": 0.0, "reward": reward(reference)}
    error = max(abs(x - y) for x, y in zip(*flat, strict=True))
    return {
        "dpo": points,
        "reward_model": {"correlation": correlation(*flat), "order_recovered": order, "largest_error": error},
        "frontier": frontier,
        "start": start,
    }


def sequences(tokenizer: Any) -> list[list[int]]:
    """Everything that two tokens can say: EOS alone, or any other token and then any token."""
    every, end = range(len(tokenizer)), tokenizer.eos_token_id
    return [[end], *([first, second] for first in every if first != end for second in every)]


def exact(model_folder: Path) -> list[list[float]]:
    """pi(y | prompt) of every sequence y, for each prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from posttrain.models.generate import completion_logps

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    said = sequences(tokenizer)
    return [
        completion_logps(model, [tokenizer(prompt).input_ids] * len(said), said, tokenizer.pad_token_id, 128)
        .double()
        .exp()
        .tolist()
        for prompt in PROMPTS
    ]


def table_rewards(tokenizer: Any) -> list[list[float]]:
    """r of every sequence, for each prompt."""
    words = {(*tokenizer(word).input_ids, tokenizer.eos_token_id): word for word in ANSWERS}
    rows = []
    for prompt in PROMPTS:
        by_word = dict(zip(ANSWERS, ODDS[prompt], strict=True))
        said = [words.get(tuple(ids)) for ids in sequences(tokenizer)]
        rows.append([math.log(by_word[word]) if word is not None else NO_ANSWER for word in said])
    return rows


def model_rewards(model_folder: Path, tokenizer: Any) -> list[list[float]]:
    """What a reward model says of every sequence, for each prompt."""
    from transformers import AutoModelForSequenceClassification

    from posttrain.models.generate import scores

    model = AutoModelForSequenceClassification.from_pretrained(model_folder).eval()
    said = sequences(tokenizer)
    return [
        scores(model, [[*tokenizer(prompt).input_ids, *ids] for ids in said], tokenizer.pad_token_id)
        for prompt in PROMPTS
    ]


def best_of(reference: list[list[float]], rewards: list[list[float]], beta: float) -> list[list[float]]:
    """pi* of every sequence, for each prompt."""
    found = []
    for row, values in zip(reference, rewards, strict=True):
        weights = [share * math.exp(value / beta) for share, value in zip(row, values, strict=True)]
        found.append([weight / sum(weights) for weight in weights])
    return found


def mean_reward(policy: list[list[float]], rewards: list[list[float]]) -> float:
    pairs = [zip(*rows, strict=True) for rows in zip(policy, rewards, strict=True)]
    return sum(share * value for row in pairs for share, value in row) / len(policy)


def prove_ppo(folder: Path) -> dict[str, Any]:
    """PPO by full fine-tuning, LoRA, and with the reward model as an adapter of the same base."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "reference")
    reference = exact(folder / "reference")
    table = table_rewards(tokenizer)
    function = f"stage.reward_functions=[{folder / 'table.py'}:reward]"
    full = [*PPO, "stage.learning_rate=1e-3", function, "run_name=full"]
    train(folder, "-m", *full, f"stage.kl_coef={','.join(map(str, BETAS))}", data="prompts.jsonl")
    train(folder, *full, "stage.kl_coef=0.5", "run_name=head", "stage.critic=head", data="prompts.jsonl")
    two = [*full, "stage.batch_size=192", "stage.micro_batch_tokens=400", "stage.kl_coef=0.5", "run_name=two"]
    train(folder, *two, "accelerate=cpu2", data="prompts.jsonl")
    losses = ",".join(GROUP_LOSSES)
    train(folder, "-m", *GRPO, function, "run_name=full", f"stage.loss_type={losses}", data="prompts.jsonl")
    lora = [*PPO, *LORA, "stage.learning_rate=2e-3"]
    train(folder, *lora, "stage.kl_coef=0.5", function, "run_name=lora", data="prompts.jsonl")
    train(folder, *REWARD, PAIRS, *LORA, "run_name=shared")
    # its scores of what is no answer range widely, which takes longer to learn
    shared = [*lora, "stage.kl_coef=1", "stage.num_epochs=600", "stage.gate=warn", "run_name=shared"]
    train(folder, *shared, f"stage.reward_model={folder / 'outputs/shared/reward'}", data="prompts.jsonl")
    runs = [("full fine-tuning", beta, f"full/ppo/stage.kl_coef={beta}", table) for beta in BETAS]
    runs.append(("critic=head", 0.5, "head/ppo", table))
    runs.append(("two processes", 0.5, "two/ppo", table))
    runs += [(name, 0.5, f"full/grpo/stage.loss_type={name}", table) for name in GROUP_LOSSES]
    runs.append(("LoRA", 0.5, "lora/ppo", table))
    runs.append(("shared base", 1.0, "shared/ppo", model_rewards(folder / "outputs/shared/reward/model", tokenizer)))
    points = []
    for name, beta, run, rewards in runs:
        policy, best = exact(folder / "outputs" / run / "model"), best_of(reference, rewards, beta)
        goals = [mean_reward(each, rewards) - beta * kl(each, reference) for each in (reference, policy, best)]
        points.append(
            {
                "run": name,
                "beta": beta,
                "J_before": goals[0],
                "J": goals[1],
                "J_best": goals[2],
                "kl_to_optimum": kl(policy, best),
                "kl": kl(policy, reference),
                "reward": mean_reward(policy, rewards),
            }
        )
    frontier = [
        {"kl": kl(best, reference), "reward": mean_reward(best, table)}
        for best in (best_of(reference, table, 10 ** (exponent / 20)) for exponent in range(-16, 31))
    ]
    (folder / "outputs/full/ppo/frontier.json").write_text(json.dumps(frontier))
    return {"points": points, "frontier": frontier, "start": {"kl": 0.0, "reward": mean_reward(reference, table)}}


def draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    panels = (
        (left, "DPO, over five answers", found["frontier"], found["dpo"], found["start"], "β"),
        (
            right,
            "PPO, over all 111 sequences",
            *(found["ppo"][name] for name in ("frontier", "points", "start")),
            "kl_coef",
        ),
    )
    for axes, title, frontier, points, start, word in panels:
        axes.plot(
            [point["kl"] for point in frontier],
            [point["reward"] for point in frontier],
            label="π*, the best reward at each KL",
        )
        for point in points:
            if point.get("run") != "shared base":  # it has a reward of its own
                more = f"{point['run']}, " if "run" in point else ""
                axes.scatter(point["kl"], point["reward"], zorder=3, label=f"{more}{word} = {point['beta']:g}")
        axes.scatter(0, start["reward"], color="grey", zorder=3, label="reference")
        axes.set(xlabel="KL from the reference (nats)", ylabel="expected reward", title=title)
        axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="closed-form-"))
    found = prove(folder.resolve())
    found["ppo"] = prove_ppo(folder.resolve())
    print("DPO: distance from the optimum, KL(π*‖π) in nats")
    print(f"{'beta':>6} {'before':>10} {'after':>10} {'limit':>7}   KL(π‖π_ref)   reward")
    for point in found["dpo"]:
        print(
            f"{point['beta']:>6g} {point['kl_to_optimum_before']:>10.4f} {point['kl_to_optimum']:>10.2e} {KL_LIMIT:>7}"
            f"   {point['kl']:>11.4f} {point['reward']:>8.4f}"
        )
    model = found["reward_model"]
    print(
        f"reward model: correlation with r {model['correlation']:.6f} (limit {CORRELATION_LIMIT}), largest error "
        f"{model['largest_error']:.4f}, order of all pairs recovered: {'yes' if model['order_recovered'] else 'no'}"
    )
    print("PPO: how far J = E[r] - β KL(π‖π_ref) is below its best, and KL(π‖π*) in nats")
    print(
        f"{'':>16} {'beta':>6} {'J before':>9} {'J best':>9} {'short by':>9} {'limit':>6} {'KL(π‖π*)':>10} {'limit':>6}"
    )
    for point in found["ppo"]["points"]:
        print(
            f"{point['run']:>16} {point['beta']:>6g} {point['J_before']:>9.4f} {point['J_best']:>9.4f} "
            f"{point['J_best'] - point['J']:>9.1e} {J_LIMIT:>6g} {point['kl_to_optimum']:>10.1e} {PPO_KL_LIMIT:>6g}"
        )
    (folder / "closed_form.json").write_text(json.dumps(found, indent=1))
    draw(found, folder / "closed_form.png")
    print(f"picture: {folder / 'closed_form.png'}; python -m posttrain.report {folder / 'outputs/full'} draws it, too")


if __name__ == "__main__":
    main()
