"""Benchmarks of lm-evaluation-harness, run on a model that is loaded already."""

import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.config.suggest import nearest
from posttrain.errors import ConfigError
from posttrain.metrics.comparison import STDERR

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEEDED = "lm-eval>=0.4.13"


def find_tasks(tasks: Sequence[str], folder: str | None) -> "TaskManager":
    """What knows the tasks, those of a folder of the user's own among them; nothing is loaded or downloaded.

    Raises:
        ConfigError: lm-evaluation-harness is not installed, or there is no such task or folder.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f'tasks= needs lm-evaluation-harness, which is not installed: pip install "{NEEDED}"')
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"tasks_folder={folder}: no such folder; it holds a yaml file for each task")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder)
    for name in tasks:
        if not manager.match_tasks([name]):
            known = nearest(name, manager.all_tasks) or "; `lm-eval ls tasks` lists those that come with it"
            raise ConfigError(f"tasks: there is no task {name}{known}")
    return manager


def run_benchmarks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    manager: "TaskManager",
    use_template: bool,
    batch_size: int,
    limit: int | None,
    num_fewshot: int | None,
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, and metric_stderr -> its standard error; a group has the mean of its tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # warns that it is handed a model that is loaded, which is what is meant
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
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
