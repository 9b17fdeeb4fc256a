"""Where the shipped configuration lives: beside the package in a checkout, inside it in a wheel."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = PACKAGE.parent
ROOT = _CHECKOUT if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "conf").is_dir() else PACKAGE
CONF = ROOT / "conf"
RECIPES = ROOT / "recipes"
ACCELERATE_CONFIGS = ROOT / "accelerate_configs"
TINY = PACKAGE / "tiny"
EMBEDDED = "posttrain/tiny"  # the name of the model in TINY
