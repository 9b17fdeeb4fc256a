"""How long a misspelt option takes to be reported: posttrain against TRL's and LLaMA-Factory's commands, in turns.

    python benchmarks/typo.py [folder]

LLaMA-Factory is installed into an environment of its own in the folder.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lines import factory_environment

ROOT = Path(__file__).resolve().parents[1]
TURNS = 5
TRL = "from trl.cli import main; main()"


def report(command: list[str], folder: Path) -> tuple[float, str]:
    """Seconds until the command has ended, and the last line that it says."""
    started = time.monotonic()
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode == 0:
        raise SystemExit(f"{' '.join(command)}: took the misspelt option")
    return seconds, done.stderr.strip().splitlines()[-1]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="typo-")).resolve()
    folder.mkdir(exist_ok=True)
    factory = factory_environment(folder)
    (folder / "sft.yaml").write_text(
        "model_name_or_path: gpt2\ndataset_name: mine\nuse_cpu: true\nbf16: false\nlerning_rate: 1.0e-4\n"
    )
    (folder / "factory.yaml").write_text(
        "model_name_or_path: gpt2\nstage: sft\ndo_train: true\nfinetuning_type: full\ndataset: mine\n"
        "template: default\noutput_dir: out\nlerning_rate: 1.0e-4\n"
    )
    sides = {
        "posttrain": [sys.executable, "-m", "posttrain.run", "stage.lerning_rate=1e-4"],
        "trl sft --config": [sys.executable, "-c", TRL, "sft", "--config", str(folder / "sft.yaml")],
        "llamafactory-cli": [str(factory / "llamafactory-cli"), "train", str(folder / "factory.yaml")],
    }
    found: dict[str, list[float]] = {name: [] for name in sides}
    told = {}
    for _ in range(TURNS):
        for name, command in sides.items():
            seconds, told[name] = report(command, folder)
            found[name].append(seconds)
    middle = {name: statistics.median(times) for name, times in found.items()}
    for name, seconds in middle.items():
        print(f"{name:<18} {seconds:6.2f} s  {seconds / middle['posttrain']:5.1f} ×  {told[name][:90]}")


if __name__ == "__main__":
    main()
