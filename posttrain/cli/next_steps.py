"""What to type after a stage: commands that can be pasted as they are."""

from pathlib import Path

from posttrain import paths
from posttrain.cli import entry
from posttrain.cli.entry import quoted
from posttrain.config.schema import Config
from posttrain.config.stages import STAGES, StageSpec, followers
from posttrain.models.resolve import of_quickstart
from posttrain.runs.folder import run_path

# words of a command that hold for the stages after it, too
CARRIED = ("run_name", "output_dir", "precision", "seed", "model", "accelerate")
NAMES_A_MODEL = ("model.model_name_or_path", "model.model_revision", "model.from_scratch", "model.chat_template_path")


def relative(path: Path) -> str:
    """A path as it is typed from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def next_commands(config: Config, folder: Path) -> list[str]:
    """The commands of the stages that build on what `folder` holds; none in a pipeline, which runs them itself."""
    if entry.name == "pipeline":
        return []
    typed = entry.typed if entry.name else [f"run_name={config.run_name}", f"output_dir={config.output_dir}"]
    return [_command(config, folder, spec, typed) for spec in followers(config.stage.name)]


def _command(config: Config, folder: Path, spec: StageSpec, typed: list[str]) -> str:
    pairs = [word.lstrip("+").partition("=")[::2] for word in typed if "=" in word]
    scores = STAGES[config.stage.name].is_classifier
    config_dir = typed[typed.index("--config-dir") + 1] if "--config-dir" in typed else None
    recipe = _recipe(dict(pairs).get("recipes", ""), spec.name, config_dir)
    words = [f"recipes={recipe}" if recipe else f"stage={spec.name}"]
    words += [f"{key}={value}" for key, value in pairs if key.split(".")[0] in CARRIED and key not in NAMES_A_MODEL]
    if recipe is None and "recipes" in dict(pairs) and "run_name" not in dict(pairs):  # the recipe's
        words.append(f"run_name={config.run_name}")
    if folder.absolute() != run_path(config).absolute():  # a point of a sweep
        key = "stage.reward_model" if scores else "model.model_name_or_path"
        words.append(f"{key}='{relative(folder)}'")
        if scores:
            words.append(f"model.model_name_or_path='{config.model.start}'")
    if recipe is None and not of_quickstart(config.model.start if scores else str(folder)):
        words.append(f"data.dataset_name={spec.data_format.name}.jsonl")
    if recipe and config_dir:
        words += ["--config-dir", config_dir]
    return " ".join(["posttrain run", *map(quoted, words)])


def _recipe(named: str, stage: str, config_dir: str | None) -> str | None:
    """The recipe of another stage beside the one that was named, if there is one."""
    wanted = f"{named.rpartition('/')[0]}/{stage}"
    folders = [paths.RECIPES, *([Path(config_dir) / "recipes"] if config_dir else [])]
    return wanted if named and any((folder / f"{wanted}.yaml").is_file() for folder in folders) else None
