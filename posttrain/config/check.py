"""The check that all sources of a configuration pass before torch is imported.

Types stand in schema.py, values in conf/. Hydra composes plain yaml; `check` then compares the result with these
dataclasses, whichever file, `+key` or `++key` a value came from, and reports all problems at once.
"""

import dataclasses
import importlib.util
import math
import operator
import os
import re
import typing
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from posttrain import paths
from posttrain.config.accelerate import accelerate_config
from posttrain.config.machines import bytes_of
from posttrain.config.reserved import ALWAYS, PATIENCE
from posttrain.config.schema import CHANGE_BASE, ROLES, Config, DataConfig, SourceConfig, StageConfig, renamed
from posttrain.config.stages import STAGES, InstructionColumns, OnlineStage, StageSpec
from posttrain.config.suggest import nearest, one_of
from posttrain.config.trl_fields import Argument, trainer_arguments
from posttrain.devices import sharding_engine
from posttrain.errors import ConfigError
from posttrain.values import JsonObject

OmegaConf.register_new_resolver("posttrain_root", lambda: str(paths.ROOT), replace=True)


TRACKERS = ("tensorboard", "trackio", "wandb")
_SECRET = re.compile(r"(?:^|_)(?:token|key|secret|password)$", re.IGNORECASE)
_NOT_SECRET = {"eos_token", "pad_token"}
_PLAIN_TYPES: dict[str, tuple[type, ...]] = {
    "float": (float, int),
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
    "None": (type(None),),
    "list": (list,),
    "dict": (dict,),
}


def leaves(node: object, path: str = "", whole: typing.Container[str] = ()) -> typing.Iterator[tuple[str, object]]:
    """Each value with its dotted path; those of `whole` in one piece."""
    if isinstance(node, dict) and node and path not in whole:
        for name, value in node.items():
            yield from leaves(value, f"{path}.{name}" if path else str(name), whole)
    else:
        yield path, node


def _schema_keys(schema: type, path: str = "") -> dict[str, dataclasses.Field[object]]:
    """Every leaf of a dataclass by its dotted path."""
    hints = typing.get_type_hints(schema)
    keys: dict[str, dataclasses.Field[object]] = {}
    for item in dataclasses.fields(schema):
        here = f"{path}{item.name}"
        if dataclasses.is_dataclass(hints[item.name]):
            keys |= _schema_keys(typing.cast(type, hints[item.name]), f"{here}.")
        else:
            keys[here] = item
    return keys


def _limit_problem(path: str, value: Any, limits: typing.Mapping[str, Any]) -> str | None:
    if value is None:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path}={value} must be a finite number"
    bounds = {"above": operator.gt, "at_least": operator.ge, "at_most": operator.le, "below": operator.lt}
    for name, holds in bounds.items():
        if name in limits and not holds(value, limits[name]):
            return f"{path}={value:g} must be {name.replace('_', ' ')} {limits[name]}"
    if "choices" in limits and value not in limits["choices"]:
        return one_of(path, value, limits["choices"])
    if "pattern" in limits and not re.fullmatch(limits["pattern"], value):
        return f"{path}={value!r} may hold letters, digits, '.', '_' and '-' only"
    return None


def _secret_problem(path: str, value: object) -> str | None:
    """A secret on the command line or in a file would end in logs and folders; the value is never repeated."""
    name = path.rsplit(".", 1)[-1]
    if _SECRET.search(name) and name not in _NOT_SECRET:
        return f"{path} looks like a secret; set it in the environment only (HF_TOKEN, WANDB_API_KEY, ...)"
    if isinstance(value, str):
        for variable, secret in os.environ.items():
            if _SECRET.search(variable) and len(secret) >= 8 and secret in value:
                return f"{path} holds the value of the environment variable {variable}; it would be written to files"
    return None


def _type_problem(path: str, value: object, argument: Argument) -> str | None:
    """Compare a trainer value with what TRL's source declares; a type that is not a plain one is left to TRL."""
    if argument.choices:
        return None if value is None or value in argument.choices else one_of(path, value, argument.choices)
    parts = [part.strip() for part in re.sub(r"\[[^\]]*\]", "", argument.annotation).split("|")]
    if not all(part in _PLAIN_TYPES for part in parts):
        return None
    allowed = tuple(kind for part in parts for kind in _PLAIN_TYPES[part])
    if isinstance(value, allowed) and not (isinstance(value, bool) and bool not in allowed):
        return None
    return f"{path}={value!r} must be {argument.annotation.replace(' | ', ' or ')}"


def trackers(report_to: str | list[str] | None) -> list[str]:
    """The trackers that trainer.report_to names."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    return [name for name in names if name != "none"]


def _check_trainer(stage: StageConfig, trainer: JsonObject) -> typing.Iterator[str]:
    spec = STAGES[stage.name]
    fields = trainer_arguments(*spec.trl_config)
    ours = renamed(stage)
    reserved = ALWAYS | dict(spec.reserved)
    own = [f"stage.{item.name}" for item in dataclasses.fields(stage)]
    for name, value in trainer.items():
        path = f"trainer.{name}"
        if name == PATIENCE:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                yield f"{path}={value!r} must be a number of evaluations, 1 or more"
            elif not trainer.get("load_best_model_at_end"):
                yield (
                    f"{path}={value} waits for a better checkpoint: it needs trainer.load_best_model_at_end=true and "
                    f"checkpoints where there are evaluations, trainer.save_steps={trainer.get('eval_steps', 0.2)}"
                )
        elif name in ours:
            yield f"{path} repeats stage.{ours[name]}; set stage.{ours[name]} only"
        elif name in reserved:
            yield f"{path} cannot be set: {reserved[name]}"
        elif name not in fields:
            known = [f"trainer.{other}" for other in (*fields, PATIENCE) if other not in {**ours, **reserved}]
            close = nearest(path, known + own)
            yield f"{path} is unknown for stage={stage.name}{close}"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{path}={value} must be a finite number"
        elif problem := _type_problem(path, value, fields[name]):
            yield problem
    for name in trackers(trainer.get("report_to")):
        if name not in TRACKERS:
            yield one_of("trainer.report_to", name, ["none", *TRACKERS])
        elif importlib.util.find_spec(name) is None:
            yield f"trainer.report_to={name}: not installed; pip install 'posttrain[trackers]'"
    yield from spec.check_trainer(trainer)
    if trainer.get("packing_strategy", "bfd") != "bfd":
        yield (
            f"trainer.packing_strategy={trainer['packing_strategy']} lets rows see each other or cuts them; "
            "only bfd keeps them apart"
        )
    for name in ("gradient_accumulation_steps", "per_device_eval_batch_size", "save_steps", "eval_steps"):
        value = trainer.get(name)
        if isinstance(value, (int, float)) and value <= 0:
            yield f"trainer.{name}={value} must be above 0"
    if isinstance(norm := trainer.get("max_grad_norm"), (int, float)) and norm < 0:
        yield f"trainer.max_grad_norm={norm} must be at least 0; 0 clips nothing"
    if trainer.get("max_steps") == 0:
        yield "trainer.max_steps=0 would train nothing; leave it out to train stage.num_epochs"


def _check_together(config: Config) -> typing.Iterator[str]:
    """Rules between keys that are each valid alone."""
    model, plan, engine = config.model, config.plan, sharding_engine()
    try:
        kind = accelerate_config(config.accelerate).get("distributed_type")
        engine = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed"}.get(str(kind), engine)
        bytes_of(plan.memory or "1GiB")
    except ConfigError as error:
        yield from error.problems
    given = [name for name, value in vars(plan).items() if value is not None and name != "mfu"]
    if given and not config.dry_run:
        yield f"plan.{given[0]} is for a dry run, which trains nothing: add dry_run=true, or leave it out"
    if model.load_in_4bit and model.load_in_8bit:
        yield "model.load_in_4bit and model.load_in_8bit exclude each other"
    elif (model.load_in_4bit or model.load_in_8bit) and not model.use_peft:
        which = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
        yield f"model.{which}=true needs model.use_peft=true: quantised weights cannot be trained themselves"
    names = config.data.dataset_name
    listed = [names] if names is None or isinstance(names, str) else names
    if not listed or not all(name is None or isinstance(name, str) for name in listed):
        yield f"data.dataset_name={names!r} must be a path, a Hub id or a list of paths"
    yield from _check_sources(config.data)
    targets = model.lora_target_modules
    named = targets or (model.lora_target_parameters and targets is not None)  # parameters may stand alone
    if not isinstance(targets, str) and not (named and all(isinstance(name, str) for name in targets)):
        yield f"model.lora_target_modules={targets!r} must be all-linear or a list of module names"
    quantised = model.load_in_4bit or model.load_in_8bit
    if model.lora_init_weights in CHANGE_BASE and (quantised or STAGES[config.stage.name].follows):
        yield (
            f"model.lora_init_weights={model.lora_init_weights} changes the frozen weights: it is for stage=sft "
            "without load_in_4bit or load_in_8bit; later stages have them as a reference, or put a head on them"
        )
    if engine is not None:  # what needs the model as a whole before or after it is trained
        asked = {f"model.lora_init_weights={name}": model.lora_init_weights == name for name in CHANGE_BASE}
        asked["trainer.precompute_ref_log_probs=true"] = bool(config.trainer.get("precompute_ref_log_probs"))
        tokens = isinstance(config.stage, OnlineStage) and config.stage.micro_batch_tokens
        asked["stage.micro_batch_tokens"] = engine == "DeepSpeed" and bool(tokens)  # it counts forward passes itself
        for what in (what for what, wanted in asked.items() if wanted):
            yield f"{what} does not work under {engine}; leave it out, or take accelerate=ddp"
    for name, role in config.data.messages.roles.items():
        if role not in ROLES:
            yield one_of(f"data.messages.roles.{name}", role, ROLES)
    rule, stage = config.data.preference, STAGES[config.stage.name]
    said = {name: value for name, value in vars(rule).items() if value is not None}
    if said and "chosen" not in {item.name for item in dataclasses.fields(stage.columns)}:
        yield (
            f"data.preference is about two answers, of which the rows of stage={stage.name} have one or none; in a "
            "pipeline name the stage: dpo.data.preference.winner=…"
        )
    elif said and not {"winner", "a", "b"} <= said.keys():
        gone = ", ".join(f"data.preference.{name}" for name in ("winner", "a", "b") if name not in said)
        yield f"data.preference.{next(iter(said))} needs {gone} beside it"
    elif said and rule.a == rule.b:
        yield f"data.preference.a and data.preference.b are both {rule.a}"
    online = config.stage if isinstance(config.stage, OnlineStage) else None
    half = "fp16" in (config.precision, os.environ.get("ACCELERATE_MIXED_PRECISION"))
    if online and online.target_kl and (half or engine == "DeepSpeed"):
        target = f"stage.target_kl={online.target_kl:g}"
        yield f"{target} skips optimizer steps, which DeepSpeed and fp16 cannot; leave it out"
    if online and online.kl_controller == "adaptive" and not online.kl_coef:
        yield "stage.kl_controller=adaptive multiplies stage.kl_coef, and 0 stays 0; begin with 0.1"
    coefficient = online.ptx_coef if online else None
    if coefficient and not config.data.ptx:
        yield f"stage.ptx_coef={coefficient:g} needs data.ptx=<a file or Hub id of instruction rows>"
    elif config.data.ptx and not coefficient:
        able = " or ".join(f"stage={spec.name}" for spec in STAGES.values() if spec.is_online)
        where = f"{able}; in a pipeline write ppo.data.ptx=…" if coefficient is None else "stage.ptx_coef above 0"
        yield f"data.ptx={', '.join(part.name for part in config.data.ptx)} is read with {where}"
    if config.data.min_margin is not None and "margin" not in {each.name for each in dataclasses.fields(stage.columns)}:
        yield (
            f"data.min_margin={config.data.min_margin:g} is about pairs, which stage={stage.name} does not read; in a "
            "pipeline name the stage: dpo.data.min_margin=…"
        )
    size = config.data.test_size
    if size >= 1 and size != int(size):
        yield f"data.test_size={size} must be a share below 1 or a whole number of rows"


def _check_sources(data: DataConfig) -> typing.Iterator[str]:
    """The sources of a mixture and of named held-out sets."""
    for path, part in data.parts().items():
        if not part.name:
            yield f"{path}.name is required: a path or a Hub id"
        columns = _schema_keys(InstructionColumns) if path.startswith("data.ptx") else vars(data.columns)
        if part.weight is not None and path.startswith("data.eval"):
            yield f"{path}.weight={part.weight} has no meaning: weights are shares of the rows to train on"
        elif part.weight is not None and not part.weight > 0:
            yield f"{path}.weight={part.weight} must be above 0"
        if part.max_rows is not None and part.max_rows < 1:
            yield f"{path}.max_rows={part.max_rows} must be at least 1"
        for column in part.columns.keys() - columns.keys():
            yield f"{path}.columns.{column} is unknown{nearest(column, columns)}"
    for path, parts in (("data.mixture", data.mixture), ("data.ptx", data.ptx)):
        weighted = [part.weight is not None for part in parts]
        if any(weighted) and not all(weighted):
            yield f"{path}: give each source a weight, or none of them"
    for name in data.eval:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name in ("train", "test"):
            yield f"data.eval.{name}: a name may hold letters, digits, '_' and '-', and be neither train nor test"
    names = [part.name for part in data.mixture]
    if names and data.dataset_name not in (None, names):
        yield "data.mixture stands in place of data.dataset_name; leave one out"


def _source(path: str, value: object) -> SourceConfig:
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, dict):
        raise ConfigError(f"{path}={value!r} must be a path, a Hub id, or keys such as {{name: a.jsonl, split: test}}")
    known = [item.name for item in dataclasses.fields(SourceConfig)]
    if unknown := [name for name in given if name not in known]:
        raise ConfigError(f"{path}.{unknown[0]} is unknown{nearest(str(unknown[0]), known)}")
    try:
        return typing.cast(
            SourceConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SourceConfig), given))
        )
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}.{error.full_key}: {str(error).splitlines()[0]}") from error


def check(composed: DictConfig) -> Config:
    """Turn a composed configuration into a typed one.

    Raises:
        ConfigError: with every unknown key, wrong type, value out of range, secret and missing key, a line each.
    """
    # 1. which stage it is, and so which keys there are
    try:
        ours = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
        plain = OmegaConf.to_container(ours, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(plain, dict)
    stage_name = plain.get("stage", {}).get("name") if isinstance(plain.get("stage"), dict) else None
    if stage_name not in STAGES:
        raise ConfigError(f"stage={stage_name} is not one of {', '.join(STAGES)}")
    spec = STAGES[stage_name]
    schema = OmegaConf.structured(Config)
    schema.stage = OmegaConf.structured(spec.schema)
    schema.data.columns = OmegaConf.structured(spec.columns)
    keys = _schema_keys(Config) | _schema_keys(spec.schema, "stage.") | _schema_keys(spec.columns, "data.columns.")
    trainer = plain.pop("trainer", None)
    # 2. each value alone
    whole = {path for path, item in keys.items() if "dict[" in str(item.type)}
    found = [*leaves(plain, whole=whole), *leaves(trainer, "trainer")]
    problems = [text for path, value in found if (text := _leaf_problem(path, value, schema, keys, spec)) is not None]
    problems += _missing(keys, {path for path, _ in leaves(plain, whole=whole)})
    if trainer is None:
        problems.append("trainer is missing; trainer={} sets nothing")
    elif problems:
        problems += _check_trainer(spec.schema(name=stage_name), trainer) if isinstance(trainer, dict) else []
    if problems:
        raise ConfigError(*problems)
    # 3. what values are together
    schema.trainer = trainer
    config = typing.cast(Config, OmegaConf.to_object(schema))
    data = config.data
    data.ptx = data.ptx if isinstance(data.ptx, list) else [] if data.ptx is None else [data.ptx]
    sources: dict[str, SourceConfig] = {}
    for path, part in data.parts().items():
        try:
            sources[path] = _source(path, part)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    data.mixture = [sources[f"data.mixture[{at}]"] for at in range(len(data.mixture))]
    data.eval = {name: sources[f"data.eval.{name}"] for name in data.eval}
    data.ptx = [part for path, part in sources.items() if path.startswith("data.ptx")]
    problems = [*_check_trainer(config.stage, config.trainer), *_check_together(config)]
    if problems:
        raise ConfigError(*problems)
    data.dataset_name = [part.name for part in data.mixture] or data.dataset_name
    return config


def _leaf_problem(
    path: str, value: object, schema: DictConfig, keys: dict[str, dataclasses.Field[object]], spec: StageSpec
) -> str | None:
    """What is wrong with one value; a value that is right is put into `schema`."""
    for inner, part in leaves(value, path):
        if "_target_" in inner.split("."):
            return f"{inner}: a configuration cannot name code to run"
        if problem := _secret_problem(inner, part):
            return problem
    if path == "trainer" or path.startswith("trainer."):
        return None
    if path.split(".")[0] == "recipes":
        return "the first line of a recipe must be `# @package _global_`"
    if path not in keys:
        known = [*keys, *(f"trainer.{name}" for name in trainer_arguments(*spec.trl_config))]
        known += [] if "." in path else ["stage", "model", "data", "trainer", "recipes", "plan"]
        return f"{path} is unknown for stage={spec.name}{nearest(path, known)}"
    if value == MISSING:
        return f"{path} is required"
    try:
        OmegaConf.update(schema, path, value)
    except (OmegaConfBaseException, ValueError):
        wanted = str(keys[path].type).removeprefix("<class '").removesuffix("'>").replace(" | ", " or ")
        wanted = wanted.replace("None", "null").replace("dict[str, typing.Any]", "dict {name: value, …}")
        return f"{path}={value!r} must be {wanted.replace('list[typing.Any]', '[{name: …}, …]')}"
    return _limit_problem(path, OmegaConf.select(schema, path), keys[path].metadata)


def _missing(keys: typing.Iterable[str], present: set[str]) -> list[str]:
    """The keys that a configuration lacks; of a section that it lacks as a whole, the section's name alone."""
    missing = [path for path in keys if path not in present and path != "trainer"]
    gone = {path.split(".")[0] for path in missing} - {path.split(".")[0] for path in present}
    alone = [f"{path} is missing" for path in missing if path.split(".")[0] not in gone]
    return [*(f"{section} is missing" for section in sorted(gone)), *alone]


def to_dict(config: Config) -> JsonObject:
    """The configuration as plain values, for files and comparison."""
    return dataclasses.asdict(config)


def differences(old: typing.Mapping[str, object], new: typing.Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """Dotted key -> (old value, new value), for each key whose values differ."""
    before, after = dict(leaves(old)), dict(leaves(new))
    return {
        path: (before.get(path), after.get(path))
        for path in [*after, *(path for path in before if path not in after)]
        if before.get(path) != after.get(path)
    }
