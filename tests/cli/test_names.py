"""Names on a command line that hold what otherwise parts it: the folders of a sweep's points have = and commas."""

from pathlib import Path

import pytest

from posttrain.cli.command import names_in, read_words
from posttrain.config.stages import STAGES
from posttrain.errors import ConfigError
from posttrain.metrics.catalogue import GOLD, METRICS


def test_the_folder_of_a_point_is_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    point = "dpo/stage.beta=0.1,stage.learning_rate=1e-05"
    with pytest.raises(ConfigError, match=r"dpo/stage\.beta is unknown"):
        read_words([point, "out=a"], ["out"])
    (tmp_path / point).mkdir(parents=True)
    assert read_words([point, "out=a"], ["out"]) == ([point], {"out": "a"})
    assert names_in(f"[sft, {point},ppo]") == ["sft", point, "ppo"]
    assert names_in("a,b") == ["a", "b"]


def test_every_number_that_a_stage_shows_has_a_name() -> None:
    shown = {
        key.removeprefix("eval_")
        for spec in STAGES.values()
        for key in (
            *spec.shown,
            *spec.swept,
            *spec.frontier,
            spec.headline,
            *(key for keys in spec.charts for key in keys),
        )
    }
    assert shown - METRICS.keys() == {GOLD}
