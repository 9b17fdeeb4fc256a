"""How long a misspelt option takes to be reported: posttrain against TRL's own command line, in turns.

python benchmarks/typo.py
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TURNS = 5
TRL = "from trl.cli import main; main()"


def report(command: list[str], folder: Path) -> tuple[float, str]:
    """Seconds until the command has ended, and the last line that it says."""
    started = time.monotonic()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode == 0:
        raise SystemExit(f"{' '.join(command)}: took the misspelt option")
    return seconds, done.stderr.strip().splitlines()[-1]


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="typo-"))
    (folder / "sft.yaml").write_text(
        "model_name_or_path: gpt2\ndataset_name: mine\nuse_cpu: true\nbf16: false\nlerning_rate: 1.0e-4\n"
    )
    sides = {
        "posttrain": [sys.executable, "-m", "posttrain.run", "stage.lerning_rate=1e-4"],
        "trl sft --config": [sys.executable, "-c", TRL, "sft", "--config", str(folder / "sft.yaml")],
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
