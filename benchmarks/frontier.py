"""What each method gains at what KL: all of them on the quickstart's world, with several seeds.

python benchmarks/frontier.py --seeds 42,2,3 --out frontier

Each seed has an SFT model and a reward model, from which every method starts; best-of-N is of the SFT model. All are
scored on the held-out prompts by the reward model and by the two functions that nothing was trained on. The same
command again goes on where it stopped.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = "posttrain.json"
METHODS = ("dpo", "kto", "ppo", "grpo", "rounds")
BEST_OF = (4, 16)
ROUNDS = 3
COLUMNS = {"kl": "KL (nats)", "reward": "reward", "style": "style", "correct": "correct", "seconds": "training (s)"}


def call(module: str, *words: str) -> None:
    """A command of posttrain; what it prints goes on, and its failure ends all."""
    print(f"\nposttrain {module} {' '.join(words)}", file=sys.stderr, flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", f"posttrain.{module}", *words], env=environment, stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(f"posttrain {module} {' '.join(words)} ended with {done.returncode}")


def train(folder: Path, seed: int, methods: list[str], overrides: list[str]) -> dict[str, list[Path]]:
    """Every method of one seed: its stages behind SFT and reward model, the last one the policy that it ends with."""
    common = (f"seed={seed}", f"output_dir={folder}", *overrides)
    found = {}
    for stage in ("sft", "reward", *(method for method in methods if method != "rounds")):
        call("run", f"recipes=quickstart/{stage}", "run_name=alone", *common)
        found[stage] = [folder / "alone" / stage]
    del found["reward"]
    if "rounds" in methods:
        for stage in ("sft", "reward"):  # the same ones; a finished run may be copied
            if not (folder / "rounds" / stage / MANIFEST).is_file():
                shutil.copytree(folder / "alone" / stage, folder / "rounds" / stage, dirs_exist_ok=True)
        words = ("recipes=quickstart", "stages=[sft,reward,pairs,dpo]", f"rounds={ROUNDS}")
        call("pipeline", *words, "run_name=rounds", *common)
        names = ("dpo", *(f"dpo-round{number}" for number in range(2, ROUNDS + 1)))
        ended = [folder / "rounds" / name for name in names if (folder / "rounds" / name / MANIFEST).is_file()]
        for number in range(len(ended)):  # it may have stopped before the last round
            found[f"round {number + 1}"] = ended[: number + 1]
    return found


def manifest(file: Path) -> dict[str, Any]:
    """What a finished stage says of itself."""
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def evaluate(folder: Path, seed: int, policies: dict[str, list[Path]], best_of: int) -> list[dict[str, Any]]:
    """The policies in their order, and best-of-N of the first one behind it."""
    out = folder / f"{'-'.join(policies).replace(' ', '')}-best-of-{best_of}.json"
    if not out.is_file():
        last = ",".join(str(stages[-1]) for stages in policies.values())
        words = (f"policies=[{last}]", "recipes=quickstart/ppo", f"best_of={best_of}", f"seed={seed}", f"out={out}")
        call("evaluate", *words, f"reward_model={folder}/alone/reward")
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def seconds_of(stages: list[Path]) -> float:
    """How long they trained, without what they started from and were rewarded by."""
    return sum(manifest(stage / MANIFEST)["cost"]["seconds"] for stage in stages)


def numbers(evaluated: dict[str, Any], seconds: float) -> dict[str, float]:
    """What the table has of one policy; the KL of best-of-N is its bound."""
    metrics, scores = evaluated["metrics"], evaluated["scores"]
    means = {name: fmean(scores[name]) for name in ("reward", "style", "correct")}
    return {"kl": metrics.get("kl", metrics.get("kl_bound")), **means, "seconds": seconds}


def of_seed(folder: Path, seed: int, methods: list[str], overrides: list[str]) -> dict[str, dict[str, float]]:
    """Method -> its numbers."""
    policies = train(folder, seed, methods, overrides)
    first, best, *others = evaluate(folder, seed, policies, BEST_OF[0])
    rows = {"SFT": numbers(first, seconds_of(policies["sft"])), f"best of {BEST_OF[0]}": numbers(best, 0.0)}
    for count in BEST_OF[1:]:
        rows[f"best of {count}"] = numbers(evaluate(folder, seed, {"sft": policies["sft"]}, count)[1], 0.0)
    for (method, stages), evaluated in zip([*policies.items()][1:], others, strict=True):
        name = f"pairs and DPO, {method}" if method.startswith("round") else method.upper()
        rows[name] = numbers(evaluated, seconds_of(stages))
    return rows


def cell(name: str, values: list[float]) -> str:
    """Mean ± standard deviation over the seeds; shares in per cent."""
    unit, digits = (100, 0) if name in ("style", "correct") else (1, 0 if name == "seconds" else 2)
    spread = f" ± {unit * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{unit * fmean(values):.{digits}f}{spread}{' %' if unit == 100 else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="42,2,3")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the runs")
    parser.add_argument("--methods", default=",".join(METHODS), help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", help="key=value for every training, such as trainer.max_steps=2")
    asked = parser.parse_args()
    methods, seeds = asked.methods.split(","), [int(seed) for seed in asked.seeds.split(",")]
    if unknown := [method for method in methods if method not in METHODS]:
        parser.error(f"--methods has {', '.join(unknown)}; choose of {', '.join(METHODS)}")
    out = asked.out.resolve()
    found = [of_seed(out / f"seed{seed}", seed, methods, asked.overrides) for seed in seeds]
    print(f"| method | {' | '.join(COLUMNS.values())} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for method in dict.fromkeys(method for rows in found for method in rows):
        there = [rows[method] for rows in found if method in rows]  # rounds may have stopped before the last one
        cells = [cell(name, [each[name] for each in there]) for name in COLUMNS]
        few = "" if len(there) == len(found) else f" ({len(there)} of {len(found)} seeds)"
        print(f"| {method}{few} | {' | '.join(cells)} |")
    print(f"\nseeds {asked.seeds}: mean ± standard deviation; the KL of best-of-N is its bound, ln N − (N−1)/N")


if __name__ == "__main__":
    main()
