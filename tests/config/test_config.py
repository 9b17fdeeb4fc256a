"""Every key is known, typed and in range, whichever way it came; all problems at once, before torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from posttrain import paths
from posttrain.cli.command import read_command
from posttrain.config.schema import Config
from posttrain.config.stages import STAGES
from posttrain.config.suggest import nearest
from posttrain.config.trl_fields import dpo_losses, trainer_arguments
from posttrain.errors import ConfigError


def problems(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        read_command(list(arguments))
    return list(error.value.problems)


def config(*arguments: str) -> Config:
    return read_command(list(arguments), to_come=None).config


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_a_misspelt_key_is_named_with_the_nearest_whatever_its_prefix(prefix: str) -> None:
    assert problems(f"{prefix}stage.lerning_rate=1") == [
        "stage.lerning_rate is unknown for stage=sft; did you mean stage.learning_rate?"
    ]
    assert problems(f"{prefix}trainer.wieght_decay=0.1") == [
        "trainer.wieght_decay is unknown for stage=sft; did you mean trainer.weight_decay?"
    ]


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("stage=dpp", "stage=dpp is not one of dpo, grpo, kto, ppo, reward, sft; did you mean ppo?"),
        ("model=gtp2", "model=gtp2 is not one of gpt2, qwen3_0.6b, qwen3_8b, tiny; did you mean gpt2?"),
        ("recipes=quickstart/stf", "did you mean quickstart/sft?"),
        ("data.evl.helpful=a.jsonl", "did you mean data.eval?"),
        ("modle=gpt2", "modle is unknown for stage=sft; did you mean model?"),
        ("data.learning_rate=1", "data.learning_rate is unknown for stage=sft; did you mean stage.learning_rate?"),
        ("stage.batch_size=abc", "stage.batch_size='abc' must be int"),
        ("data.messages.roles={bot: asistant}", "data.messages.roles.bot=asistant is not one of"),
        ("data.preference.winner=labels", "data.preference is about two answers, of which the rows of stage=sft"),
        ("data.train_on=first", "data.train_on=first is not one of all, last"),
        ("data.chat_template_kwargs=thinking", "data.chat_template_kwargs='thinking' must be dict"),
        ("data.chat_template_kwargs={api_key: abc}", "data.chat_template_kwargs.api_key looks like a secret"),
        ("stage.warmup_steps=1.5", "stage.warmup_steps=1.5 must be int"),
        ("stage.batch_size=0", "stage.batch_size=0 must be at least 1"),
        ("stage.max_length=-5", "stage.max_length=-5 must be at least 2"),
        ("stage.learning_rate=nan", "stage.learning_rate=nan must be a finite number"),
        ("stage.learning_rate=-1", "stage.learning_rate=-1 must be above 0"),
        ("stage.num_epochs=0", "stage.num_epochs=0 must be above 0"),
        ("seed=-1", "seed=-1 must be at least 0"),
        ("run_name=../x", "run_name='../x' may hold letters, digits"),
        ("data.overlength=trunc", "is not one of truncate, drop, error; did you mean truncate?"),
        ("trainer.learning_rate=1", "trainer.learning_rate repeats stage.learning_rate"),
        ("trainer.per_device_train_batch_size=1", "repeats stage.batch_size; set stage.batch_size only"),
        ("trainer.bf16=true", "trainer.bf16 cannot be set: set precision=bf16"),
        ("trainer.weight_decay=abc", "trainer.weight_decay='abc' must be float"),
        ("trainer.packing=1", "trainer.packing=1 must be bool"),
        ("trainer.packing_strategy=wrapped", "lets rows see each other"),
        ("trainer.lr_scheduler_type=cosin", "did you mean cosine?"),
        ("trainer.optim=adamw8bit", "did you mean adamw_8bit?"),
        ("trainer.save_strategy=false", "trainer.save_strategy=False is not one of no, steps, epoch, best"),
        ("trainer.loss_type=nl", "trainer.loss_type=nl is not one of nll, dft, chunked_nll"),
        ("trainer.max_grad_norm=-1", "trainer.max_grad_norm=-1 must be at least 0"),
        ("trainer.push_to_hub=true", "posttrain export <its folder> push_to_hub=<owner/name>"),
        ("trainer.disable_tqdm=true", "set TQDM_DISABLE=1 in the environment"),
        ("trainer.bf16_full_eval=true", "judged by posttrain's own loop, in the precision of training"),
        ("trainer.deepspeed=ds.json", "set accelerate=zero2"),
        ("model.load_in_4bit=true", "model.load_in_4bit=true needs model.use_peft=true"),
        ("model.model_name_or_path=./nope", "no such folder"),
        ("data.dataset_name=nope.jsonl", "no such file"),
        ("data.dataset_name=recipes/quickstart/prompt.jsonl", "did you mean recipes/quickstart/prompts.jsonl?"),
        ("data.dataset_name=???", "data.dataset_name is required"),
        ("model=gpt2", "data.dataset_name is required for stage=sft"),
        ("lr=1", "lr is unknown for stage=sft; did you mean stage.learning_rate?"),
        ("stage.epochs=1", "did you mean stage.num_epochs?"),
        ("trainer.report_to=tensorbord", "did you mean tensorboard?"),
        ("output_dir=", "output_dir is empty"),
        ("output_dir=s3://bucket/o", "output_dir=s3://bucket/o must be a folder of this machine"),
        ("run_name=" + "a" * 300, "a file name may have 255"),
        ("hydra.job.chdir=true", "hydra.job.chdir cannot be set; of hydra.*, only hydra.launcher.*"),
        ("hydra.searchpath=[file:///]", "hydra.searchpath cannot be set"),
        ("+hydra.launcher.x._target_=os.system", "a configuration cannot name code to run"),
        ("~model", "model is missing"),
        ("data._target_=os.system", "a configuration cannot name code to run"),
        ("+x.y._target_=os.system", "a configuration cannot name code to run"),
        ("stage.learning_rate=1,2", "add -m to sweep"),
    ],
)
def test_one_problem_one_line(argument: str, told: str) -> None:
    [problem] = problems(argument)
    assert told in problem


def test_all_problems_are_told_at_once() -> None:
    told = problems("stage.lr=1", "+trainer.nope=1", "stage.batch_size=x", "data.test_size=-1", "model=nope", "hello=1")
    assert len(told) == 6


def test_every_value_of_a_sweep_is_checked_before_it_starts() -> None:
    assert problems("-m", "stage.learning_rate=1e-4,abc", "stage.batch_size=4,0") == [
        "stage.learning_rate='abc' must be float",
        "stage.batch_size=0 must be at least 1",
    ]
    assert read_command(["-m", "stage.learning_rate=1e-4,2e-4", "seed=1"]).swept == ["stage.learning_rate"]


@pytest.mark.parametrize("key", ["trainer.hub_token", "model.token", "+api_key", "+model.x.password", "data.secret"])
def test_secrets_are_refused_and_never_repeated(key: str) -> None:
    [problem] = problems(f"{key}=hf_abcdefgh")
    assert "environment only" in problem
    assert "hf_abcdefgh" not in problem


def test_the_value_of_a_secret_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    [problem] = problems("run_name='${oc.env:HF_TOKEN}'")
    assert "HF_TOKEN" in problem
    assert "hf_abcdefgh" not in problem


def test_documented_defaults() -> None:
    stage = config().stage
    values = (stage.learning_rate, stage.batch_size, stage.num_epochs, stage.max_length, stage.warmup_steps)
    assert values == (2e-4, 4, 3, 512, 100)


def every_choice() -> list[list[str]]:
    models = [[f"model={file.stem}"] for file in (paths.CONF / "model").glob("*.yaml") if file.stem != "base"]
    trainers = [[f"trainer={file.stem}"] for file in (paths.CONF / "trainer").glob("*.yaml")]
    recipes = [[f"recipes={file.relative_to(paths.RECIPES).with_suffix('')}"] for file in paths.RECIPES.rglob("*.yaml")]
    return [*models, *trainers, *recipes]


@pytest.mark.parametrize("choice", every_choice(), ids=" ".join)
def test_every_shipped_yaml_loads_and_its_keys_exist(choice: list[str]) -> None:
    found = config("data.dataset_name=someone/some-data", *choice)
    assert set(found.trainer) <= set(trainer_arguments(*STAGES[found.stage.name].trl_config))


def test_fields_read_from_the_sources_are_those_of_the_class() -> None:
    import dataclasses

    from trl import SFTConfig

    fields = {name for name in trainer_arguments(*STAGES["sft"].trl_config) if not name.startswith("_")}
    assert {field.name for field in dataclasses.fields(SFTConfig) if field.init} <= fields


def test_choices_are_read_from_the_sources() -> None:
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    found = trainer_arguments(*STAGES["dpo"].trl_config)
    assert set(found["lr_scheduler_type"].choices) == {kind.value for kind in SchedulerType}
    assert set(found["optim"].choices) == {kind.value for kind in OptimizerNames}
    assert {"sigmoid", "ipo", "hinge", "robust", "apo_zero", "sft"} <= set(dpo_losses())
    [problem] = problems("stage=dpo", "trainer.loss_type=[sigmoid,ipoo]")
    assert problem.startswith("trainer.loss_type=ipoo is not one of sigmoid, hinge, ipo, ")
    assert problem.endswith("did you mean ipo?")
    [problem] = problems("stage=dpo", "trainer.label_smoothing=0.1")
    assert problem == (
        "trainer.label_smoothing is read by trainer.loss_type=robust, exo_pair, aot, aot_unpaired only, not by sigmoid"
    )
    [problem] = problems("stage=dpo", "trainer.early_stopping_patience=3")
    assert "it needs trainer.load_best_model_at_end=true" in problem
    [problem] = problems("trainer.early_stopping_patience=0", "trainer.load_best_model_at_end=true")
    assert problem.startswith("trainer.early_stopping_patience=0 must be a number of evaluations")
    [problem] = problems("trainer.early_stoping_patience=3")
    assert problem.endswith("did you mean trainer.early_stopping_patience?")
    [problem] = problems("stage=dpo", "trainer.sync_ref_model=true")
    assert "the reference stays as it is" in problem


def test_a_user_recipe_is_checked_too(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("# @package _global_\nstage:\n  lerning_rate: 1\nseed: 7\n")
    assert problems("--config-dir", str(tmp_path), "recipes=mine") == [
        "stage.lerning_rate is unknown for stage=sft; did you mean stage.learning_rate?"
    ]
    (tmp_path / "recipes" / "mine.yaml").write_text("# @package _global_\nstage:\n  learning_rate: 1\nseed: 7\n")
    assert config("--config-dir", str(tmp_path), "recipes=mine").seed == 7


def test_nearest_says_nothing_about_what_is_far() -> None:
    assert nearest("zzzz", ["stage.learning_rate"]) == ""


def test_a_typo_is_answered_with_exit_code_2_and_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, runpy\nsys.argv = ['posttrain', 'stage.lerning_rate=1', 'stage=sft', '+trainer.nope=1']\n"
        "try:\n    runpy.run_module('posttrain.run', run_name='__main__')\n"
        "except SystemExit as ended:\n"
        "    heavy = {'torch', 'transformers', 'trl', 'datasets', 'numpy'} & set(sys.modules)\n"
        "    print(ended.code, sorted(heavy))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[-2] == "2 []"
    assert "did you mean stage.learning_rate?" in done.stderr
    assert list(tmp_path.iterdir()) == []
