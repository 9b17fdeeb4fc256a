"""Benchmarks of lm-evaluation-harness, run on a model that is loaded already."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.config.suggest import nearest
from posttrain.errors import ConfigError
from posttrain.metrics.comparison import STDERR

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "lm-eval>=0.4.13"


@dataclass(frozen=True)
class Benchmarks:
    """Which tasks to run, and on how much of them."""

    tasks: Sequence[str]
    limit: int | None  # rows of each task; None: all
    num_fewshot: int | None  # None: as the task says
    manager: "TaskManager"


def find_benchmarks(tasks: Sequence[str], folder: str | None, limit: int | None, num_fewshot: int | None) -> Benchmarks:
    """Look the tasks up, those of a folder of the user's own among them; nothing is loaded or downloaded.

    Raises:
        ConfigError: lm-evaluation-harness is not installed, or there is no such task or folder.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f'tasks= needs lm-evaluation-harness, which is not installed: pip install "{PACKAGE}"')
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"tasks_folder={folder}: no such folder; it holds a yaml file for each task")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder)
    missing = [name for name in tasks if not manager.match_tasks([name])]
    if missing:
        more = "; `lm-eval ls tasks` lists them, and tasks_folder= adds a folder of your own"
        raise ConfigError(
            *(f"tasks: there is no task {name}{nearest(name, manager.all_tasks) or more}" for name in missing)
        )
    return Benchmarks(tasks, limit, num_fewshot, manager)


def run_benchmarks(
    asked: Benchmarks,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    use_template: bool,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, and metric_stderr -> its standard error; a group has the mean of its tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(asked.tasks),
        task_manager=asked.manager,
        limit=asked.limit,
        num_fewshot=asked.num_fewshot,
        apply_chat_template=use_template,
        log_samples=False,
    )
    return {task: numbers(values) for task, values in found["results"].items()}


def numbers(values: Mapping[str, object]) -> dict[str, float]:
    """The harness's `acc,none` and `acc_stderr,none` as `acc` and `acc_stderr`; another filter stays in the name."""
    found = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if comma and isinstance(value, (int, float)) and math.isfinite(value):
            name = metric.removesuffix(STDERR) + ("" if chosen == "none" else f",{chosen}")
            found[name + (STDERR if metric.endswith(STDERR) else "")] = float(value)
    return found
