"""Packed rows against padded ones, on rows as long as those of instruction data: tokens that carry loss per second.

    python benchmarks/packing.py

The lengths are log-normal (median 60 tokens, a tenth above 200, at most 512), roughly those of Alpaca's rows. Both
sides read all rows once, at eight sequences an update, in turns.
"""

import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS, TURNS = 400, 3


def rate(folder: Path, name: str, *more: str) -> float:
    """Trained tokens over the seconds of training, as posttrain counts both."""
    command = [
        *(sys.executable, "-m", "posttrain.run", "data.dataset_name=rows.jsonl", f"run_name={name}", "overwrite=true"),
        *("model.model_name_or_path=posttrain/tiny", "stage.num_epochs=1", "stage.batch_size=8", "data.test_size=0"),
        *("trainer.eval_strategy=no", "trainer.save_strategy=no", *more),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    metrics = json.loads((folder / f"outputs/{name}/sft/posttrain.json").read_text())["metrics"]
    entries = [json.loads(line) for line in (folder / f"outputs/{name}/sft/metrics.jsonl").read_text().splitlines()]
    return float(metrics["trained_tokens"] / entries[-1]["train_runtime"])


def main() -> None:
    draw = random.Random(0)
    folder = Path(tempfile.mkdtemp(prefix="packing-"))
    words = [min(int(math.exp(draw.gauss(math.log(60), 0.95))) + 1, 440) for _ in range(ROWS)]
    rows = [{"instruction": f"Say {n}.", "response": " ".join(["word"] * count)} for n, count in enumerate(words)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found: dict[str, list[float]] = {"padded": [], "packed": []}
    for _ in range(TURNS):
        found["padded"].append(rate(folder, "padded"))
        found["packed"].append(rate(folder, "packed", "trainer.packing=true"))
    middle = {name: statistics.median(rates) for name, rates in found.items()}
    for name, tokens in middle.items():
        print(f"{name}  {tokens:8,.0f} tokens/s  {tokens / middle['padded']:.2f} ×")


if __name__ == "__main__":
    main()
