"""Is the optimum reached? Reward modelling and DPO on a problem whose every answer can be enumerated.

    python benchmarks/closed_form.py [folder]

Three prompts have five answers each, with rewards r = ln k for whole numbers k, so that pairs can be written down
in exact Bradley-Terry proportion (k_a of k_a + k_b times a wins) and no sampling noise limits the result. The
reference is a random model. Trained through the real entry point,
- DPO must reach pi*(y|x) proportional to pi_ref(y|x) exp(r(x,y) / beta)   (Rafailov et al. 2023, equation 4), and
- the reward model must recover r up to a constant for each prompt.
Prints the distances, and draws the measured (KL, reward) points on the theoretical frontier.
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


def train(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "posttrain.run", *arguments, *SETTINGS]
    command += [f"model.model_name_or_path={folder / 'reference'}", f"data.dataset_name={folder / 'pairs.jsonl'}"]
    command += [f"output_dir={folder / 'outputs'}", f"stage.batch_size={len(PROMPTS) * 4 * sum(ODDS['river'])}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")


def distributions(model_folder: Path) -> list[list[float]]:
    """pi(answer | prompt), for each prompt, over the enumerated answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from posttrain.evaluation import completion_logps

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

    from posttrain.evaluation import scores

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
    from posttrain.report_card import correlation

    folder.mkdir(parents=True, exist_ok=True)
    write_problem(folder)
    reference = distributions(folder / "reference")
    train(folder, "-m", *DPO, f"stage.beta={','.join(map(str, BETAS))}")
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
    train(folder, *REWARD)
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


def draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(
        [point["kl"] for point in found["frontier"]],
        [point["reward"] for point in found["frontier"]],
        label="π*, the best reward at each KL",
    )
    for point in found["dpo"]:
        axes.scatter(point["kl"], point["reward"], zorder=3, label=f"DPO, β = {point['beta']:g}")
    axes.scatter(0, found["start"]["reward"], color="grey", zorder=3, label="reference")
    axes.set(xlabel="KL from the reference (nats)", ylabel="expected reward", title="Does DPO reach the optimum?")
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="closed-form-"))
    found = prove(folder.resolve())
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
    (folder / "closed_form.json").write_text(json.dumps(found, indent=1))
    draw(found, folder / "closed_form.png")
    print(f"picture: {folder / 'closed_form.png'}")


if __name__ == "__main__":
    main()
