"""Take a language model through SFT, reward modelling, and PPO, GRPO, DPO or KTO.

usage: posttrain <command> [arguments]        posttrain <command> --help
tab completion, in bash or zsh: eval "$(posttrain -sc install=bash)"

examples:
  posttrain pipeline recipes=quickstart
  posttrain run stage=dpo --help
"""

import runpy
import sys

from posttrain import __version__
from posttrain.cli import completion
from posttrain.cli.command import parse, read_words
from posttrain.cli.entry import entry_point, guarded
from posttrain.cli.help import COMMANDS, MODULES, overview, recipe_lines
from posttrain.config.stages import STAGES
from posttrain.config.suggest import nearest
from posttrain.console import say, show_table
from posttrain.errors import ConfigError
from posttrain.runs.folder import versions


def main() -> None:
    """The command `posttrain`: `posttrain run …` is `python -m posttrain.run …`."""
    first, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if first in ("-h", "--help"):
        print(overview())
    elif first == "--version":
        print(f"posttrain {__version__}")
    elif first in ("-sc", "--shell-completion"):
        sys.exit(guarded(lambda: completion.complete(rest)))
    elif first in ("recipes", "version"):
        sys.argv = [sys.argv[0], *rest]
        recipes() if first == "recipes" else version()
    elif first in COMMANDS:
        sys.argv = [sys.argv[0], *rest]
        runpy.run_module(f"posttrain.{MODULES.get(first, first)}", run_name="__main__", alter_sys=True)
    else:
        sys.exit(guarded(lambda: _refuse(first)))


def _refuse(word: str) -> None:
    if "=" in word:
        raise ConfigError(f"posttrain needs a command first: posttrain run {' '.join(sys.argv[1:])}")
    if word in STAGES:
        raise ConfigError(f"{word} is a stage: posttrain run stage={word}")
    raise ConfigError(f"{word} is not one of {', '.join(COMMANDS)}{nearest(word, COMMANDS)}")


def recipes() -> None:
    """List the recipes: what each is and what it needs.

    usage: posttrain recipes [--config-dir <folder>]

      --config-dir <folder>    list those in <folder>/recipes, too

    examples:
      posttrain recipes
      posttrain run recipes=quickstart/sft
    """

    def show() -> None:
        if (line := parse(sys.argv[1:])).prints or line.words:
            raise ConfigError(
                f"{[*line.prints, *line.words][0]} is unknown; posttrain recipes takes --config-dir alone"
            )
        show_table("recipes", ("recipes=", ""), recipe_lines(line.config_dir))
        say("all stages of a folder: posttrain pipeline recipes=<folder>, such as quickstart")

    entry_point("recipes", show)


def version() -> None:
    """Print the versions of posttrain and its libraries.

    usage: posttrain version

    examples:
      posttrain version
      posttrain --version
    """

    def show() -> None:
        read_words(sys.argv[1:], [])
        print("\n".join(f"{name} {number}" for name, number in versions().items()))

    entry_point("version", show)


if __name__ == "__main__":
    main()
