"""Tab completion: Hydra's, taught the subcommands, the recipes and the keys of a pipeline."""

import contextlib
import io
import os
import sys
from collections.abc import Sequence

import hydra

from posttrain import paths
from posttrain.cli.help import COMMANDS, recipe_lines
from posttrain.config.stages import FORMATS, STAGES, STEPS
from posttrain.errors import ConfigError

SECTIONS = ("data.", "trainer.", "model.")


def complete(arguments: Sequence[str]) -> None:
    """Do what `posttrain -sc install=bash` and `-sc query=bash` ask; the line to complete is in COMP_LINE."""
    if not any(argument.startswith("query=") for argument in arguments):
        _hydra(arguments)
        return
    words = os.environ.get("COMP_LINE", "").split(" ")[1:]
    if len(words) < 2:
        print(" ".join(name for name in COMMANDS if name.startswith("".join(words))))
    elif words[-1].startswith("recipes="):
        pipeline = words[0] == "pipeline"
        names = [name.rpartition("/")[0] if pipeline else name for name, _ in recipe_lines(None)]
        print(" ".join(word for name in dict.fromkeys(names) if (word := f"recipes={name}").startswith(words[-1])))
    elif words[0] == "pipeline":
        print(" ".join(_of_pipeline(words[-1], arguments)))
    elif words[0] in ("run", "evaluate", "pairs"):
        print(" ".join(_matches(words[1:], arguments)))


def _of_pipeline(word: str, arguments: Sequence[str]) -> list[str]:
    """The keys of a stage under its name, and what goes to all stages."""
    stage, dot, rest = word.partition(".")
    if dot and stage in STAGES:
        own = [match.removeprefix("stage.") for match in _matches([f"stage={stage}", f"stage.{rest}"], arguments)]
        others = [match for match in _matches([f"stage={stage}", rest], arguments) if match.startswith(SECTIONS)]
        return [f"{stage}.{match}" for match in own + others]
    mine = ["stages=", "rounds=", *(f"{name}." for name in STEPS)]
    mine += [f"data.{name}=" for name in FORMATS]
    others = [match for match in _matches([word], arguments) if not match.startswith(("stage", "data"))]
    return [match for match in mine if match.startswith(word)] + others


def _matches(words: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """What Hydra offers for the last word of a line of `posttrain run`."""
    os.environ["COMP_LINE"] = " ".join(["posttrain", *words])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        _hydra(arguments)
    return printed.getvalue().split()


def _hydra(arguments: Sequence[str]) -> None:
    given, sys.argv = sys.argv, [sys.argv[0], "-sc", *arguments]
    try:
        hydra.main(config_path=str(paths.CONF), config_name="config", version_base="1.3")(lambda config: None)()
    except ValueError as error:
        raise ConfigError(f"-sc needs install=bash, uninstall=bash or query=bash ({error})") from error
    finally:
        sys.argv = given
