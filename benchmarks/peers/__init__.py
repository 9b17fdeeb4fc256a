"""What others would write and run, each in an environment of its own."""

import subprocess
import sys
from pathlib import Path


def environment(folder: Path, *packages: str) -> Path:
    """The programs of a virtual environment in the folder with these packages, made on the first call."""
    programs = folder / "bin"
    if not (programs / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(programs / "python"), "-m", "pip", "install", "--quiet", *packages], check=True)
    return programs
