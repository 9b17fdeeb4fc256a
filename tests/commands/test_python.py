"""The package as a notebook uses it: data sets and callbacks of one's own, results as frames and models, each piece."""

import math
from pathlib import Path
from typing import Any

import pytest

import posttrain
from posttrain import configure, run_stage

SHORT = ("trainer.max_steps=4", "trainer.logging_steps=1", "run_name=notebook")
ROWS = [{"instruction": f"Say {number}.", "response": f"It is {number}."} for number in range(30)]
PAIRS = [{"prompt": f"Say {n}.", "chosen": f"It is {n}, sir.", "rejected": f"{n}"} for n in range(30)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    for name in posttrain.__all__:
        assert (vars(posttrain).get(name) or posttrain.__getattr__(name)).__doc__, name
    with pytest.raises(AttributeError, match="PPOTrianer"):
        posttrain.__getattr__("PPOTrianer")


def test_data_sets_and_callbacks_of_ones_own(folder: Path) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback

    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.steps += 1

    count = Count()
    train, held_out = Dataset.from_list(ROWS[:20]), Dataset.from_list(ROWS[20:])
    result = run_stage(configure(*SHORT), train_dataset=train, eval_dataset=held_out, callbacks=[count])
    assert result is not None
    assert count.steps == 4
    history = result.history
    assert history["loss"].notna().sum() == 4
    assert math.isclose(history["eval_loss"].dropna().iloc[-1], result.metrics["eval_loss"], rel_tol=1e-6)
    model, tokenizer = result.load()
    ids = tokenizer("It is 7.", return_tensors="pt").input_ids
    assert model(ids).logits.shape == (1, ids.shape[1], model.config.vocab_size)
    again = run_stage(configure(*SHORT), train_dataset=train, eval_dataset=held_out)
    assert again is not None
    assert again.metrics == result.metrics


def test_without_held_out_rows_a_share_is_held_out_and_another_data_set_is_another_run(folder: Path) -> None:
    from datasets import Dataset

    config = configure("stage=reward", "data.test_size=6", "model.model_name_or_path=posttrain/tiny", *SHORT)
    result = run_stage(config, train_dataset=Dataset.from_list(PAIRS))
    assert result is not None
    assert 0 <= result.metrics["accuracy"] <= 1
    model, _ = result.load()
    assert model.config.num_labels == 1
    with pytest.raises(posttrain.errors.ConfigError):
        run_stage(config, train_dataset=Dataset.from_list(PAIRS[:20]))


def test_data_sets_that_cannot_be_taken_are_refused(folder: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows, empty = Dataset.from_list([row | {"split": "train"} for row in ROWS]), Dataset.from_list([])
    config = configure(*SHORT)
    for options in (
        {"train_dataset": ROWS},
        {"train_dataset": DatasetDict(train=rows)},
        {"train_dataset": rows.to_iterable_dataset()},
        {"train_dataset": empty},
        {"train_dataset": rows, "eval_dataset": empty},
        {"eval_dataset": rows},
    ):
        with pytest.raises(posttrain.errors.ConfigError, match=f"^{list(options)[-1]} "):
            run_stage(config, **options)
    for words in (["model.model_name_or_path=./nowhere"], ["stage=ppo"]):  # as on the command line, rows or not
        with pytest.raises(posttrain.errors.ConfigError, match=r"nowhere: no such folder|needs a reward"):
            configure(*words)
    with pytest.raises(posttrain.errors.ConfigError, match=r"data\.dataset_name is required"):
        run_stage(configure("model=gpt2", *SHORT))
    assert run_stage(configure(*SHORT, "dry_run=true"), train_dataset=rows) is None


def test_a_bad_row_of_a_data_set_is_named(folder: Path) -> None:
    from datasets import Dataset

    with pytest.raises(posttrain.errors.DataError, match="train_dataset row 2"):
        run_stage(configure(*SHORT), train_dataset=Dataset.from_list([ROWS[0], {"instruction": "", "response": "a"}]))


def test_each_piece_as_a_notebook_uses_it(folder: Path) -> None:
    import torch
    from datasets import Dataset
    from trl import DPOConfig, RewardConfig, SFTConfig

    from posttrain import (
        DPOTrainer,
        RewardModel,
        RewardModelTrainer,
        RolloutBuffer,
        SFTTrainer,
        ValueNetwork,
        compute_dpo_loss,
        format_instruction,
        load_model_and_tokenizer,
        setup_device,
    )
    from posttrain.data.chat import ChatEncoder

    model, tokenizer = load_model_and_tokenizer(configure("model=tiny").model, folder / "base")
    encoder = ChatEncoder(tokenizer)
    messages = format_instruction(ROWS[0])
    assert [message["role"] for message in messages] == ["user", "assistant"]
    ids = encoder.encode([encoder.segments(format_instruction(row)) for row in ROWS])
    options = {"max_steps": 2, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no"}
    sft = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir="sft", dataset_kwargs={"skip_prepare_dataset": True}, **options),
        train_dataset=Dataset.from_list([{"input_ids": row, "labels": labels} for row, labels in ids]),
        processing_class=tokenizer,
    )
    assert sft.train().global_step == 2

    def encoded(text: str) -> list[int]:
        return list(tokenizer(text).input_ids)

    pairs = [
        {"prompt_ids": encoded(row["prompt"]), "chosen_ids": encoded(row["chosen"]), "rejected_ids": encoded("no")}
        for row in PAIRS
    ]
    dpo = DPOTrainer(
        model=model,
        args=DPOConfig(output_dir="dpo", **options),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    assert dpo.train().global_step == 2

    from transformers import AutoModelForSequenceClassification

    sft.save_model("sft/model")
    scorer = AutoModelForSequenceClassification.from_pretrained("sft/model", num_labels=1)
    scorer.config.pad_token_id = tokenizer.pad_token_id
    whole = [{name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")} for row in pairs]
    reward = RewardModelTrainer(
        model=scorer,
        args=RewardConfig(output_dir="reward", **options),
        train_dataset=Dataset.from_list(whole),
        processing_class=tokenizer,
    )
    assert reward.train().global_step == 2
    judged = RewardModel(scorer.eval(), tokenizer)
    assert judged.score([messages]) == pytest.approx(judged([encoder.encode([encoder.segments(messages)])[0][0]]))

    values = ValueNetwork(hidden_size=8)(torch.randn(2, 5, 8))
    assert values.shape == (2, 5)
    assert not values.any()  # its head begins at 0
    ones = torch.ones(2, 3)
    buffer = RolloutBuffer(ones.long(), ones, ones.long(), torch.tensor([[1, 1, 0], [1, 0, 0]]), ones, ones, ones, ones)
    assert buffer.tokens == 3
    assert buffer.take([1]).completion_ids.shape == (1, 1)
    loss, _, _ = compute_dpo_loss(ones[0], ones[0], ones[0], ones[0], beta=0.1)
    assert torch.allclose(loss, torch.full((3,), math.log(2)))
    assert setup_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_ppo_as_a_notebook_uses_it(folder: Path) -> None:
    """Policy, critic, prompts and a reward function, put together by hand."""
    from datasets import Dataset

    from posttrain import PPOTrainer, ValueNetwork, load_model_and_tokenizer
    from posttrain.config.stages import PPOStage
    from posttrain.data.chat import ChatEncoder
    from posttrain.rlhf.critic import critic_trunk
    from posttrain.rlhf.ppo import PPOConfig
    from posttrain.rlhf.rollout_plan import plan_rollouts

    config = configure("stage=ppo", "model=tiny", "stage.reward_functions=[rewards.length]", "stage.max_new_tokens=6")
    stage = config.stage
    assert isinstance(stage, PPOStage)
    stage.batch_size, stage.rollout_batch_size, stage.num_mini_batches, stage.ppo_epochs = 4, 8, 2, 2
    policy, tokenizer = load_model_and_tokenizer(config.model, folder / "base")
    reference, _ = load_model_and_tokenizer(config.model, folder / "base")
    trunk, _ = load_model_and_tokenizer(config.model, folder / "base")
    encoder = ChatEncoder(tokenizer)
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in PAIRS[:16]]
    ids = [encoder.prompt_ids(prompt) for prompt in prompts]
    plan, seen = plan_rollouts(stage, len(prompts), processes=1), []
    trainer = PPOTrainer(
        rows=[{"prompt": prompt, "prompt_ids": row} for prompt, row in zip(prompts, ids, strict=True)],
        plan=plan,
        reference=reference,
        value=lambda model: ValueNetwork(model.config.hidden_size, critic_trunk(trunk)),
        on_rollout=lambda trainer, rollout: seen.append(rollout.numbers["kl"]),
        held_out=lambda trainer: {},
        reward_funcs=[lambda completions, **columns: [float(len(each[0]["content"])) for each in completions]],
        model=policy,
        args=PPOConfig(
            stage=stage,
            output_dir="ppo",
            max_steps=8,
            per_device_train_batch_size=plan.batch_size,
            gradient_accumulation_steps=plan.accumulation,
            steps_per_generation=plan.accumulation * plan.mini_batches,
            generation_batch_size=plan.rollout,
            num_iterations=plan.passes,
            max_completion_length=stage.max_new_tokens,
            learning_rate=1e-3,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=Dataset.from_dict({"prompt_ids": ids}),
        processing_class=tokenizer,
    )
    assert trainer.train().global_step == 8
    assert len(seen) == 2
    assert seen[0] == pytest.approx(0, abs=1e-4)
    assert seen[1] != seen[0]
