"""A sweep over four values of dpo.beta against four full pipelines: one machine, one run.

python benchmarks/sweep.py
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BETAS = ("0.05", "0.1", "0.3", "1")
PIPELINE = [sys.executable, "-m", "posttrain.pipeline", "recipes=quickstart"]


def seconds(*arguments: str, folder: Path) -> float:
    """How long a pipeline takes, from its start to its end."""
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*PIPELINE[:3], *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return time.monotonic() - started


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="sweep-"))
    recipe = PIPELINE[3]
    sweep = seconds("-m", recipe, "run_name=swept", f"dpo.beta={','.join(BETAS)}", folder=folder)
    alone = [seconds(recipe, f"run_name=beta{beta}", f"dpo.beta={beta}", folder=folder) for beta in BETAS]
    again = seconds("-m", recipe, "run_name=swept", f"dpo.beta={','.join(BETAS)}", folder=folder)
    print(f"one sweep of {len(BETAS)} points {sweep:6.0f} s")
    print(f"{len(BETAS)} full pipelines    {sum(alone):6.0f} s   the sweep takes {sweep / sum(alone):.2f} of that")
    print(f"the sweep again      {again:6.0f} s   nothing to do")


if __name__ == "__main__":
    main()
