"""What a command costs, by the operating system's account of child processes."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# a parent that waits for nothing else
_WATCHER = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
if done.returncode: sys.exit(done.stdout.decode())
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


class Cost(NamedTuple):
    """Of a command with all its processes."""

    seconds: float  # of CPU time
    peak: float  # bytes of its largest process


def cost_of(arguments: Sequence[str], folder: Path, **environment: str) -> Cost:
    """Run `python <arguments>` in a folder.

    Raises:
        SystemExit: it fails, with what it printed.
    """
    done = subprocess.run(
        [sys.executable, "-c", _WATCHER, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, kilobytes = done.stdout.split()
    return Cost(float(seconds), int(kilobytes) * 1024)
