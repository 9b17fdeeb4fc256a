"""What a stage starts from: which model, reward model and rows, and the hashes by which they are known again."""

import contextlib
import importlib.util
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from posttrain import paths
from posttrain.config.schema import Config, ModelConfig
from posttrain.config.stages import FORMATS, STAGES, OnlineStage, other_models
from posttrain.errors import ConfigError
from posttrain.paths import EMBEDDED
from posttrain.runs.folder import IDENTITY, MANIFEST, PARTS, read_json, read_object, sha256_of
from posttrain.values import JsonObject


def weight_hashes(folder: Path) -> dict[str, str]:
    """File name -> sha256 of the weights and the tokenizer in a model's or an adapter's folder."""
    names = ("*.safetensors", "tokenizer.json", "chat_template.jinja", "config.json", "adapter_config.json")
    files = [path for name in names for path in sorted(folder.glob(name))]
    return {path.name: sha256_of(path) for path in files}


def import_from_here() -> None:
    """Let modules of the current folder be imported, of which an installed command does not know."""
    sys.path[:0] = [] if {"", str(Path.cwd())} & set(sys.path) else [str(Path.cwd())]


def code_hashes(functions: Collection[str]) -> dict[str, str]:
    """Reward function, as a configuration names it -> sha256 of the file that holds it."""
    files = {}
    import_from_here()
    for spec in functions:
        module = spec.rpartition(":" if ":" in spec else ".")[0]
        found = importlib.util.find_spec(module) if not module.endswith(".py") else None
        file = Path(found.origin) if found is not None and found.origin else Path(module).expanduser()
        files[spec] = sha256_of(file)
    return files


def adapter_base(adapter: Path) -> str:
    """The folder or Hub id of the model that an adapter was trained on, also where its run has been moved since.

    Raises:
        ConfigError: adapter_config.json is broken.
    """
    file, key = adapter / "adapter_config.json", "base_model_name_or_path"
    settings = read_object(file, [key], "copy the adapter again, or train it again")
    stored = str(settings[key]) if settings is not None else ""
    parent = parent_of(adapter)
    if parent is None:
        return stored
    if (base := adapter.parent / "base").is_dir():
        return str(base)
    moved = adapter.parent.parent.joinpath(*Path(stored).parts[-2:])  # <run>/sft/model beside <run>/dpo
    same = moved.is_dir() and weight_hashes(moved) == parent["inputs"]["model"]["weights"]
    return str(moved) if same else stored


def parent_of(model_folder: Path) -> JsonObject | None:
    """The manifest of the run that made a model folder, if a run of ours did.

    Raises:
        ConfigError: the manifest is broken.
    """
    run = model_folder.parent
    needed = ("stage", *PARTS.values(), "inputs")
    return read_object(run / MANIFEST, needed, f"train {run} again with overwrite=true")


def input_hashes(model_folder: Path) -> dict[str, str]:
    """The `weight_hashes` of a model or adapter that something starts from; none of a model on the Hub.

    Raises:
        ConfigError: a run of ours made it, and it is no longer what that run wrote.
    """
    found = weight_hashes(model_folder)
    parent = parent_of(model_folder) if model_folder.name in PARTS else None
    written = parent[PARTS[model_folder.name]] if parent is not None else found
    for name, digest in found.items():
        if written.get(name) != digest:
            raise ConfigError(
                f"{model_folder / name} has changed since its run wrote it; train {model_folder.parent} again with "
                f"overwrite=true, or copy {model_folder.name}/ elsewhere to take it as it is"
            )
    return found


@dataclass(frozen=True)
class Resolved:
    """A configuration with everything that its stage starts from filled in, and where that is."""

    config: Config
    why: str  # this starting model was taken
    start: Path  # of the model; where it is on the Hub, a path where nothing is
    others: dict[str, Path]  # the same of a reward model and a reference, where the stage has one of its own
    to_come: Collection[str] = ()  # stages whose results are not there yet; in a dry run something stands in for them

    @property
    def folders(self) -> dict[str, Path]:
        """Each model that the stage starts from."""
        return {"model": self.start} | self.others

    def keep_out_of(self, folder: Path) -> None:
        """Refuse a folder for the result that holds what it is made of: making room there would delete it.

        Raises:
            ConfigError: one of the models is in it.
        """
        for name, start in self.folders.items():
            if folder.resolve() in (start.resolve(), *start.resolve().parents):
                raise ConfigError(
                    f"{folder} holds the {name.replace('_', ' ')} that is asked for; choose another folder"
                )


def resolve(config: Config, to_come: Collection[str] = (), needs_data: bool = True) -> Resolved:
    """Find out what a stage starts from: model, reward model and rows.

    What stages that are still `to_come` will make is not asked for: the base model stands for what they start from.
    Without `needs_data`, rows need not be named.

    Raises:
        ConfigError: a run whose model this stage would take has not finished, a path does not exist or holds no
            model, an online stage has no reward, or no data are named for another model than the quickstart's.
    """
    config, why = with_models(config, to_come)
    start = Path(resolve_path(config.model))
    others = {}
    for name, path in other_models(config.stage).items():
        with naming(f"stage.{name}"):
            others[name] = Path(resolve_path(beside(config.model, path)))
    return Resolved(with_data(config) if needs_data else config, why, start, others, to_come)


def with_models(config: Config, to_come: Collection[str] = ()) -> tuple[Config, str]:
    """The configuration with its models' paths filled in, and why this starting model was taken; see `resolve`."""
    config, why = _with_starting_model(config, to_come)
    return _with_reward_model(config, to_come), why


def with_data(config: Config) -> Config:
    """The configuration with the quickstart's rows where no data are named, for models of the quickstart alone.

    Raises:
        ConfigError: no data are named, and the stage starts from another model; shows a row of its format.
    """
    if config.data.dataset_name is not None:
        return config
    if not of_quickstart(config.model.start):
        raise data_required(config)
    rows = _quickstart_file(STAGES[config.stage.name].data_format.name)
    return replace(config, data=replace(config.data, dataset_name=str(rows)))


def data_required(config: Config) -> ConfigError:
    """Of a stage that starts from another model than the quickstart's and names no data."""
    name, row, _ = STAGES[config.stage.name].data_format
    return ConfigError(
        f"data.dataset_name is required for stage={config.stage.name}: the quickstart's rows are only for the "
        f"quickstart's models. Name your {name}, for example a .jsonl file of rows like {row}: "
        f"data.dataset_name={name}.jsonl"
    )


def _quickstart_file(data_format: str) -> Path:
    return paths.RECIPES / "quickstart" / f"{data_format}.jsonl"


def of_quickstart(start: str) -> bool:
    """Whether a model is the embedded one, or was trained from it on the quickstart's rows alone."""
    if start == paths.EMBEDDED:
        return True
    manifest = read_json(Path(start) / MANIFEST, f"train {start} again with overwrite=true")
    if not isinstance(manifest, dict):
        return False
    shipped = {sha256_of(file) for file in map(_quickstart_file, FORMATS) if file.is_file()}
    return set(manifest["data"]["sources"].values()) <= shipped and of_quickstart(manifest["inputs"]["model"]["path"])


def _with_reward_model(config: Config, to_come: Collection[str]) -> Config:
    stage = config.stage
    if not isinstance(stage, OnlineStage) or stage.reward_model is not None or stage.reward_functions:
        return config
    scorer = next(name for name in STAGES[stage.name].follows if STAGES[name].is_classifier)
    reward = Path(config.output_dir) / config.run_name / scorer
    if (reward / MANIFEST).is_file():
        return replace(config, stage=replace(stage, reward_model=str(reward)))
    if scorer in to_come:
        return config
    begun = f"{reward} has not finished" if (reward / IDENTITY).is_file() else f"{reward} is not there"
    raise ConfigError(
        f"stage={stage.name} needs a reward, and {begun}: run stage={scorer} run_name={config.run_name} first, or name "
        "one with stage.reward_model=<folder or Hub id> or stage.reward_functions=[my_rewards.concise]"
    )


def _with_starting_model(config: Config, to_come: Collection[str]) -> tuple[Config, str]:
    if config.model.model_name_or_path is not None:
        return config, "as named"
    base = replace(config, model=replace(config.model, model_name_or_path=config.model.base_model))
    first = next(iter(STAGES[config.stage.name].follows), None)
    if first is None:
        return base, "the base model"
    run = Path(config.output_dir) / config.run_name / first
    if (run / MANIFEST).is_file():
        model = replace(config.model, model_name_or_path=str(run), from_scratch=False)
        return replace(config, model=model), f"the {first} model of this run"
    if first in to_come:
        return base, f"in place of the {first} model that is still to come"
    if (run / IDENTITY).is_file():
        raise ConfigError(
            f"{run} has not finished; run stage={first} run_name={config.run_name} again, "
            "or name another model with model.model_name_or_path=…"
        )
    return base, "the base model"


def resolve_path(model: ModelConfig) -> str:
    """The folder or Hub id that the configuration names; a finished stage's folder stands for its model.

    Raises:
        ConfigError: a path that does not exist, or a folder that holds no model.
    """
    name = model.start
    if name == EMBEDDED:
        return str(paths.TINY)
    folder = Path(name)
    if not folder.is_dir():
        # an id on the Hub has one slash at most, and what is before it is no folder of runs
        finished = ("*/posttrain.json", "*/*/posttrain.json")
        runs = "/" in name and any(any(folder.parent.glob(each)) for each in finished)
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or runs:
            raise ConfigError(f"model.model_name_or_path={name}: no such folder")
        return name
    if (folder / "model" / "config.json").is_file():
        if not (folder / "posttrain.json").is_file():
            raise ConfigError(f"model.model_name_or_path={name}: this run has not finished (no posttrain.json)")
        return str(folder / "model")
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"model.model_name_or_path={name}: neither config.json nor adapter_config.json is there")
    return name


def all_reward_functions(config: Config) -> list[str]:
    """All reward functions of a stage, those that it is not trained on among them."""
    stage = config.stage
    return [*stage.reward_functions, *stage.eval_reward_functions] if isinstance(stage, OnlineStage) else []


def beside(model: ModelConfig, path: str) -> ModelConfig:
    """The settings under which another model, at `path`, is loaded whole beside the one being trained."""
    return replace(
        model,
        model_name_or_path=path,
        model_revision="main",
        from_scratch=False,
        chat_template_path=None,
        use_peft=False,
        load_in_4bit=False,
        load_in_8bit=False,
    )


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """Let errors over a model name the option that it came from."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(
            *(problem.replace("model.model_name_or_path=", f"{key}=") for problem in error.problems)
        ) from error


def is_local_model(model: ModelConfig) -> bool:
    """Whether the model can be had without a network."""
    return model.start == EMBEDDED or Path(model.start).is_dir()
