"""A step that breaks the weights ends the run there: no checkpoint of it, no NaN in the logs, and the cause named."""

import json
from pathlib import Path

import pytest
from conftest import STAGES, Posttrain, command

from posttrain.runs.checkpoint import checkpoints, newest_whole

# the learning rate is 0 in the first step; in the second, 1 - learning rate × decay is infinite
BROKEN = ("+trainer.weight_decay=1e45", "stage.warmup_steps=4", "stage.batch_size=4", "trainer.save_steps=1")


def no_nan(folder: Path) -> None:
    """JSON knows neither NaN nor Infinity."""
    for file in (folder / "metrics.jsonl", *folder.glob("checkpoint-*/trainer_state.json")):
        for line in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(line, parse_constant=pytest.fail)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_breaks_the_weights_is_not_saved(posttrain: Posttrain, sources: Path, stage: str) -> None:
    done = posttrain(*command(stage, "demo", *BROKEN))
    assert done.code == 1, done
    folder = Path("outputs/demo", stage)
    assert "step 2 left weights" in done.err
    assert f"{folder}/checkpoint-1)" in done.err
    assert "stage.learning_rate=" in done.err
    assert newest_whole(folder) == (folder / "checkpoint-1", [])
    assert len(checkpoints(folder)) == 1
    assert not (folder / "model").exists()
    no_nan(folder)


@pytest.mark.parametrize("stage", STAGES)
def test_weights_that_give_nan_are_not_the_result_without_checkpoints_too(
    posttrain: Posttrain,
    sources: Path,
    stage: str,
) -> None:
    """They are finite, but what is computed of them in float16 overflows."""
    more = ("model.dtype=float16", "trainer.save_strategy=no", "data.test_size=0", "stage.learning_rate=900")
    done = posttrain(
        *command(stage, "demo", "stage.batch_size=4", "stage.warmup_steps=0", "trainer.max_steps=1", *more)
    )
    assert done.code == 1, done
    assert "step 1 left weights whose outputs are NaN" in done.err
    assert "there is no checkpoint yet" in done.err
    assert not Path("outputs/demo", stage, "model").exists()
    no_nan(Path("outputs/demo", stage))
