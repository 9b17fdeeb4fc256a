"""What a run says of its progress: a bar in a terminal, a line for each log entry elsewhere, and metrics.jsonl."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import ROOT, command, logged, start

NUMBERS = {"sft": ("loss", "held-out loss", "lr"), "ppo": ("reward", "KL", "loss", "held-out reward", "held-out KL")}


@pytest.mark.parametrize("stage", NUMBERS)
def test_without_a_terminal_there_is_a_short_line_for_each_log_entry(sources: Path, stage: str) -> None:
    process = start(*command(stage, "demo", "stage.batch_size=4", "trainer.eval_steps=2"), cwd=sources)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (out, err)
    assert "\r" not in out + err
    lines = [line for line in out.splitlines() if re.match(r"step \d+/4  \d+%  |before training  ", line)]
    assert max(map(len, lines)) < 100
    assert all(re.search(r"  [\d,]+ tokens/s  \d+:\d\d:\d\d left$", line) for line in lines if "step 4/4" in line)
    assert "step 4/4  100%  " in "\n".join(lines)
    assert {name for name in NUMBERS[stage] if any(f"  {name} " in line for line in lines)} == set(NUMBERS[stage])
    entries = logged(sources / f"outputs/demo/{stage}")
    shown = ("loss", "eval_loss", "reward", "eval_reward")
    assert len(lines) == sum(any(name in entry for name in shown) for entry in entries)
    times = [datetime.fromisoformat(entry["time"]) for entry in entries]
    assert times == sorted(times)
    assert (datetime.now(UTC) - times[0]).total_seconds() < 120
    kinds = [(entry["step"], *sorted(entry.keys())) for entry in entries]
    assert len(set(kinds)) == len(kinds), "an entry is there twice"


def test_in_a_terminal_the_newest_numbers_survive_80_columns(sources: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "posttrain.run", *command("sft", "demo", "stage.batch_size=4", "trainer.eval_steps=2")],
        cwd=sources,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # all is read, and the other end is closed
            break
    assert process.wait() == 0
    bars = [line for line in shown.decode().replace("\n", "\r").split("\r") if "/4 [" in line]
    assert max(map(len, bars)) <= 80
    entries = logged(sources / "outputs/demo/sft")
    loss, held_out = ([entry[name] for entry in entries if name in entry][-1] for name in ("loss", "eval_loss"))
    assert bars[-1].startswith(f"loss {loss:.4g}, held-out loss {held_out:.4g} ")
    assert "100%" in bars[-1]
