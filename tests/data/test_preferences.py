"""Preference rows: read in every documented layout, encoded once for all, ties and cuts counted."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers_for_tests as made
from conftest import data_config, prepared, splits_of, write_rows

from posttrain.data.chat import ChatEncoder
from posttrain.data.encode import PairEncoding
from posttrain.data.formats import format_preference, preferences
from posttrain.data.messages import parse_transcript
from posttrain.data.template import plain_template
from posttrain.errors import DataError

HUMAN = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Two?\n\nAssistant:"
USER = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Two?"},
]


def read(path: Path, **changes: Any) -> Any:
    return splits_of(preferences, data_config(str(path), "dpo", changes.pop("columns", {}), **changes))


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_the_three_layouts_are_the_same_row() -> None:
    strings = {"prompt": "Two?", "chosen": "2", "rejected": "3"}
    assert format_preference(strings) == (USER[2:], says("2"), says("3"))
    messages = {"prompt": USER, "chosen": says("2"), "rejected": says("3")}
    transcripts = {"chosen": f"{HUMAN} 2", "rejected": f"{HUMAN} 3"}
    whole = {"chosen": [*USER, *says("2")], "rejected": [*USER, *says("3")]}
    assert format_preference(messages) == format_preference(transcripts) == format_preference(whole)


def test_transcripts_that_part_early_keep_what_they_share_as_the_prompt() -> None:
    chosen = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: One?\n\nAssistant: 1"
    rejected = "\n\nHuman: Hi\n\nAssistant: Go away\n\nHuman: One?\n\nAssistant: No"
    prompt, better, worse = format_preference({"chosen": chosen, "rejected": rejected})
    assert prompt == USER[:1]
    assert [message["content"] for message in better] == ["Hello", "One?", "1"]
    assert [message["content"] for message in worse] == ["Go away", "One?", "No"]


def test_a_line_of_text_that_only_mentions_human_is_no_turn() -> None:
    found = parse_transcript("\n\nHuman: What is Human: here?\nHuman: still me\n\nAssistant: A word.", "chosen")
    assert [message["content"] for message in found] == ["What is Human: here?\nHuman: still me", "A word."]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "a", "chosen": "b"}, "no 'rejected' (found: prompt, chosen); format 'preference' needs"),
        ({"chosen": "b", "rejected": "c"}, "no 'prompt' (found: chosen, rejected)"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "'chosen' is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "'rejected' must be a text or a list of messages, got null"),
        ({"chosen": f"{HUMAN} 2", "rejected": HUMAN}, "turn 4 of 'rejected' is empty"),
        ({"chosen": f"{HUMAN} 2", "rejected": "\n\nHuman: Other\n\nAssistant: 3"}, "do not begin with the same prompt"),
        ({"prompt": USER[:2], "chosen": "b", "rejected": "c"}, "must take turns"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"}, "'margin' must be a number, got str"),
        ({"question": "a", "better": "b", "worse": "c"}, "try data.columns.prompt=question data.columns.chosen=better"),
    ],
)
def test_a_broken_pair_is_named(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", [row])
    with pytest.raises(DataError) as error:
        read(path)
    assert f"{path} line 1" in str(error.value)
    assert told in str(error.value)


def test_bad_rows_can_be_left_out_and_are_told(tmp_path: Path) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write_rows(tmp_path / "pairs.jsonl", [good, {"prompt": "a"}, good])
    splits = read(path, bad_rows="drop")
    assert (splits.counts["train"].read, splits.counts["train"].bad, len(splits.train)) == (3, 1, 2)
    assert any("line 2: no 'chosen'" in note for note in splits.notes)


def encoder() -> ChatEncoder:
    tokenizer = made.gpt2_like()
    tokenizer.chat_template = plain_template(tokenizer)
    return ChatEncoder(tokenizer)


def pairs(tmp_path: Path, encoding: PairEncoding, tokenizer: Any, *rows: dict[str, Any], **changes: Any) -> Any:
    data = data_config(str(write_rows(tmp_path / "pairs.jsonl", list(rows))), "dpo", **changes)
    return prepared(preferences, encoding, tokenizer, data, tmp_path / "cache")


@pytest.mark.parametrize("make", [made.gpt2_like, made.chatml, made.llama_like])
def test_a_reward_model_reads_the_ids_of_the_whole_conversation(tmp_path: Path, make: Any) -> None:
    """The one encoder: prompt as at generation, answer, the token that ends the turn, and nothing after it."""
    tokenizer = make()
    tokenizer.chat_template = tokenizer.chat_template or plain_template(tokenizer)
    chat = ChatEncoder(tokenizer)
    row = {"prompt": USER, "chosen": says("one two"), "rejected": says("three")}
    [whole] = pairs(tmp_path, PairEncoding(200, "error"), tokenizer, row).train.dataset
    [apart] = pairs(tmp_path, PairEncoding(200, "error", learns_tokens=True), tokenizer, row).train.dataset
    assert apart["prompt_ids"] == chat.prompt_ids(USER)
    assert len(apart["prompt_ids"]) == whole["prompt_length"]
    assert apart["chosen_ids"][-1] == apart["rejected_ids"][-1] == chat.end_id
    for side, answer in (("chosen_ids", "one two"), ("rejected_ids", "three")):
        expected = chat.encode([chat.segments([*USER, *says(answer)])])[0][0]
        assert whole[side] == expected == apart["prompt_ids"] + apart[side]


def test_ties_are_left_out_also_those_that_the_cut_makes(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "chosen": "one", "rejected": "two"},
        {"prompt": "a", "chosen": "same", "rejected": "same"},
        {"prompt": "a", "chosen": "one " * 30 + "good", "rejected": "one " * 30 + "bad"},
    ]
    chat = encoder()
    room = len(chat.prompt_ids([{"role": "user", "content": "a"}])) + 20
    found = pairs(tmp_path, PairEncoding(room, "truncate"), chat.tokenizer, *rows)
    assert [row.where[-6:] for row in found.train.rows] == ["line 1"]
    counts = found.counts["train"]
    assert (counts.kept, counts.ties, counts.truncated) == (1, 2, 0)
    ties = pairs(tmp_path, PairEncoding(room, "truncate"), chat.tokenizer, rows[1])
    assert ties.train is None
    assert ties.counts["train"].ties == 1


def test_margins_stand_in_all_rows_or_in_none(tmp_path: Path) -> None:
    good, encoding = {"prompt": "a", "chosen": "b", "rejected": "c"}, PairEncoding(100, "error")
    found = pairs(tmp_path, encoding, encoder().tokenizer, good | {"margin": 2})
    assert list(found.train.dataset["margin"]) == [2.0]
    assert "margin" not in pairs(tmp_path, encoding, encoder().tokenizer, good).train.dataset.column_names
    with pytest.raises(DataError, match="line 2: no 'margin', but 1 of 2 rows have one"):
        pairs(tmp_path, encoding, encoder().tokenizer, good | {"margin": 2}, good)


def test_hub_sources_are_tried_and_told_when_out_of_reach(tmp_path: Path) -> None:
    from posttrain.errors import ConfigError

    with pytest.raises(ConfigError, match="Anthropic/hh-rlhf is neither a file here nor a data set"):
        read(Path("Anthropic/hh-rlhf"))


def test_the_layout_of_hh_rlhf_is_read_from_a_file(tmp_path: Path) -> None:
    rows = [{"chosen": f"{HUMAN} {n}", "rejected": f"{HUMAN} not {n}"} for n in range(6)]
    found = read(write_rows(tmp_path / "hh.jsonl", rows))
    assert [json.loads(row.content)[0] for row in found.train] == [USER] * 6


@pytest.mark.parametrize("logits", [2**25, 140], ids=["by rows", "by logits"])
def test_log_probabilities_and_kl_against_a_loop(monkeypatch: pytest.MonkeyPatch, logits: int) -> None:
    """Batched and padded, they are what each row alone gives, position by position; so are those of a batch's room."""
    from contextlib import nullcontext

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from posttrain.models import generate
    from posttrain.models.generate import completion_kl, completion_logps

    monkeypatch.setattr(generate, "LOGITS", logits)
    policy, reference = (
        GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=1, n_head=2)) for _ in "ab"
    )
    policy.eval(), reference.eval()
    prompts, completions = [[1, 2, 3], [4], [5, 6]], [[7, 8], [9, 10, 11, 12], [13]]
    logps = completion_logps(policy, prompts, completions, pad=0, batch_size=2)
    kl = completion_kl(policy, lambda: nullcontext(reference), prompts, completions, pad=0, batch_size=2)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        wanted_logp = wanted_kl = 0.0
        for position, token in enumerate(completion):
            ids = torch.tensor([prompt + completion[:position]])
            with torch.no_grad():
                ours, theirs = (model(ids).logits[0, -1].log_softmax(-1) for model in (policy, reference))
            wanted_logp += float(ours[token])
            wanted_kl += float((ours.exp() * (ours - theirs)).sum())
        assert float(logps[row]) == pytest.approx(wanted_logp, abs=1e-4)
        assert float(kl[row]) == pytest.approx(wanted_kl, abs=1e-5)


def test_the_kind_of_a_pair_is_read_where_its_column_is_named(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "kind": kind} for kind in ("correct", 3, None)]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    named = {"columns": {"group": "kind"}}
    assert [pair.group for pair in read(path, **named).train] == ["correct", "3", None]
    own = write_rows(
        tmp_path / "own.jsonl",
        [
            {"prompt": "a", "chosen": "b", "rejected": "c", "group": "x"},
            {"prompt": "a", "chosen": "d", "rejected": "c"},
        ],
    )
    assert [pair.group for pair in read(own).train] == ["x", None]
    unnamed = read(path)
    assert [pair.group for pair in unnamed.train] == [None] * 3
    assert [pair.content for pair in unnamed.train] == [pair.content for pair in read(path, **named).train]
    openai = {
        "input": {"messages": USER},
        "preferred_output": says("2"),
        "non_preferred_output": says("3"),
        "kind": "x",
    }
    assert [pair.group for pair in read(write_rows(path, [openai]), **named).train] == ["x"]
    for row, told in (({}, "no 'kind', which data.columns.group names"), ({"kind": [1]}, "'group' must be a text or")):
        with pytest.raises(DataError, match=told):
            read(write_rows(path, [{"prompt": "a", "chosen": "b", "rejected": "c", **row}]), **named)
