"""The shapes in which public data sets write conversations, preferences and prompts, and what must be refused."""

import dataclasses
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import data_config, splits_of, write_rows

from posttrain.cli.command import compose_config
from posttrain.config.check import check
from posttrain.config.schema import MessagesConfig, PreferenceConfig
from posttrain.data.formats import instructions, preferences, prompts
from posttrain.errors import ConfigError, DataError

ASKED = {"role": "user", "content": "Two plus two?"}
SAID = {"role": "assistant", "content": "Four."}
WRONG = {"role": "assistant", "content": "Five."}
MORE = [ASKED, SAID, {"role": "user", "content": "And one more?"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
READERS = {"sft": instructions, "reward": preferences, "dpo": preferences, "ppo": prompts}
ROOT = Path(__file__).parents[2]
MESSAGES = MessagesConfig(role=None, content=None, roles={}, train=None)


def read(tmp_path: Path, stage: str, rows: Any, columns: dict[str, Any] | None = None, **changes: Any) -> Any:
    given = rows if isinstance(rows, list) else [rows]
    return splits_of(
        READERS[stage], data_config(str(write_rows(tmp_path / "rows.jsonl", given)), stage, columns, **changes)
    )


def sharegpt(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system", "tool": "function"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


CONVERSATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "messages": ({"messages": [ASKED, SAID]}, "messages"),
    "more keys, null": ({"messages": [{**ASKED, "name": None, "tool_calls": None}, SAID], "tools": None}, "messages"),
    "content in parts": (
        {"messages": [{**ASKED, "content": [{"type": "text", "text": "Two plus two?"}]}, SAID]},
        "messages",
    ),
    "ShareGPT": ({"id": "c", "conversations": sharegpt([ASKED, SAID])}, "ShareGPT"),
    "Alpaca": ({"instruction": "Two plus two?", "input": "", "output": "Four."}, "Alpaca"),
    "ours": ({"instruction": "Two plus two?", "response": "Four."}, "instruction and response"),
    "a rendered copy beside it": ({"instruction": "Two plus two?", "output": "Four.", "text": "### x"}, "Alpaca"),
    "prompt and completion": ({"prompt": "Two plus two?", "completion": "Four."}, "prompt and completion"),
    "prompt and completion as messages": ({"prompt": [ASKED], "completion": [SAID]}, "prompt and completion"),
    "JSON text": ({"messages": json.dumps([ASKED, SAID])}, "messages"),
    "a transcript": ({"messages": "\n\nHuman: Two plus two?\n\nAssistant: Four."}, "messages"),
    "a transcript with hashes": ({"messages": "### Human: Two plus two?### Assistant: Four."}, "messages"),
}


@pytest.mark.parametrize("shape", CONVERSATIONS)
def test_a_conversation_is_read_without_a_key(tmp_path: Path, shape: str) -> None:
    row, name = CONVERSATIONS[shape]
    splits = read(tmp_path, "sft", row)
    assert splits.train[0].messages == [ASKED, SAID]
    assert splits.notes[0].startswith(f"format: {name}")
    prompts = read(tmp_path, "ppo", row)
    assert prompts.train[0].prompt == [ASKED]
    assert any("left out" in note for note in prompts.notes) == ("prompt" not in row)


def test_prompts_are_conversations_up_to_the_users_last_message(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    talks = [MORE, [*MORE, SAID], [*MORE, call, {"role": "tool", "content": "4"}, SAID]]
    rows = [{"messages": talk, "conversations": []} for talk in talks]
    splits = read(tmp_path, "ppo", rows)
    assert [row.prompt for row in splits.train] == [MORE] * 3
    assert any("of 2 rows are left out" in note for note in splits.notes)


def test_tools_and_their_calls_are_read_as_openai_writes_them(tmp_path: Path) -> None:
    call = {"id": "c0", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
    talk = [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c0", "content": "4"},
        SAID,
    ]
    splits = read(tmp_path, "sft", [{"messages": talk, "tools": TOOLS}, {"messages": [ASKED, SAID], "tools": []}])
    row = splits.train[0]
    assert row.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"id": "c0", **CALL}]}
    assert row.messages[2] == {"role": "tool", "content": "4", "tool_call_id": "c0"}
    assert row.inputs.tools == TOOLS
    assert splits.notes == ["format: messages, 2 rows; tools in 1"]


def test_calls_as_json_text_are_calls_where_the_row_has_tools(tmp_path: Path) -> None:
    flat = json.dumps([{"name": "add", "parameters": {"type": "object"}}])
    row = {"query": "Two plus two?", "answers": json.dumps([CALL["function"]]), "tools": flat}
    splits = read(tmp_path, "sft", row, {"instruction": "query", "response": "answers"})
    assert splits.train[0].messages[1]["tool_calls"] == [CALL]
    assert splits.train[0].inputs.tools == TOOLS


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_reasoning_is_kept(tmp_path: Path, key: str) -> None:
    splits = read(tmp_path, "sft", {"messages": [ASKED, {**SAID, key: "2 + 2"}]})
    assert splits.train[0].messages[1] == {**SAID, "reasoning_content": "2 + 2"}


@pytest.mark.parametrize("key", ["weight", "train", "loss", "loss_weight", "mine"])
@pytest.mark.parametrize("no", [0, False])
def test_a_turn_that_shall_not_be_trained_is_marked(tmp_path: Path, key: str, no: Any) -> None:
    talk = [*MORE[:1], {**SAID, key: no}, MORE[2], {**SAID, key: 1}]
    changes = {"messages": MessagesConfig(role=None, content=None, roles={}, train="mine")} if key == "mine" else {}
    row = read(tmp_path, "sft", {"messages": talk}, **changes).train[0]
    assert [message.get("train", True) for message in row.messages] == [True, False, True, True]
    with pytest.raises(DataError, match=rf"{key}=0\.5"):
        read(tmp_path, "sft", {"messages": [ASKED, {**SAID, key: 0.5}]}, **changes)


def test_earlier_answers_in_a_prompt_carry_no_loss(tmp_path: Path) -> None:
    row = read(tmp_path, "sft", {"prompt": MORE, "completion": [SAID]}).train[0]
    assert [message.get("train", True) for message in row.messages] == [True, False, True, True]


def test_other_keys_and_roles_are_named(tmp_path: Path) -> None:
    row = {"turns": [{"speaker": "bot_user", "said": "Two plus two?"}, {"speaker": "bot", "said": "Four."}]}
    names = {"bot": "assistant", "bot_user": "user"}
    messages = MessagesConfig(role="speaker", content="said", roles=names, train=None)
    assert read(tmp_path, "sft", row, {"messages": "turns"}, messages=messages).train[0].messages == [ASKED, SAID]
    for fault, key in (
        ({"messages": [{"speaker": "a", "content": "b"}, SAID]}, "data.messages.role"),
        ({"messages": [{"role": "user", "said": "b"}, SAID]}, "data.messages.content"),
        ({"messages": [{"role": "bot", "content": "b"}, SAID]}, "data.messages.roles"),
    ):
        with pytest.raises(DataError, match=key):
            read(tmp_path, "sft", fault)


def test_system_and_history_go_before_the_question(tmp_path: Path) -> None:
    before = [{"role": "system", "content": "Be brief."}, *MORE[:2]]
    row = {
        "system": "Be brief.",
        "history": [["Two plus two?", "Four."]],
        "query": "And one more?",
        "response": "Five.",
    }
    expected = [*before, MORE[2], WRONG]
    assert read(tmp_path, "sft", row, {"instruction": "query"}).train[0].messages == expected
    as_messages = row | {"history": MORE[:2]}
    assert read(tmp_path, "sft", as_messages, {"instruction": "query"}).train[0].messages == expected
    pair = {"system": "Be brief.", "question": "Two plus two?", "chosen": "Four.", "rejected": "Five."}
    [read_pair] = read(tmp_path, "dpo", pair, {"prompt": "question"}).train
    assert read_pair.prompt == [before[0], ASKED]
    prompt = {"system": "Be brief.", "history": MORE[:2], "prompt": "And one more?"}
    assert read(tmp_path, "ppo", prompt).train[0].prompt == [before[0], *MORE]


PAIRS: dict[str, dict[str, Any]] = {
    "ours": {"prompt": "Two plus two?", "chosen": "Four.", "rejected": "Five."},
    "whole conversations": {"prompt": "Two plus two?", "chosen": [ASKED, SAID], "rejected": [ASKED, WRONG]},
    "a prompt that is not how they begin": {
        "prompt": "Two plus two? ",
        "chosen": [ASKED, SAID],
        "rejected": [ASKED, WRONG],
    },
    "OpenAI's": {
        "input": {"messages": [ASKED], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [SAID],
        "non_preferred_output": [WRONG],
    },
    "one message each": {
        "conversations": sharegpt([ASKED]),
        "chosen": sharegpt([SAID])[0],
        "rejected": sharegpt([WRONG])[0],
    },
    "a transcript that ends with the question": {
        "prompt": "\n\nHuman: Two plus two?",
        "chosen": "Four.",
        "rejected": "Five.",
    },
    "a transcript and texts": {
        "prompt": "\n\nHuman: Two plus two?\n\nAssistant:",
        "chosen": " Four.",
        "rejected": " Five.",
    },
    "with scores": {
        **{"prompt": "Two plus two?", "chosen": "Four.", "rejected": "Five."},
        **{"score_chosen": 8.5, "score_rejected": 8.5},
    },
}


@pytest.mark.parametrize("shape", PAIRS)
def test_a_pair_is_read_without_a_key(tmp_path: Path, shape: str) -> None:
    splits = read(tmp_path, "dpo", PAIRS[shape])
    [pair] = splits.train
    assert (pair.prompt, pair.chosen, pair.rejected, pair.margin) == ([ASKED], [SAID], [WRONG], None)
    differ = [note for note in splits.notes if "is not how chosen and rejected begin" in note]
    assert bool(differ) == (shape == "a prompt that is not how they begin")
    assert read(tmp_path, "ppo", PAIRS[shape]).train[0].prompt[0]["content"].strip() == ASKED["content"]


def test_what_both_conversations_begin_with_is_the_prompt(tmp_path: Path) -> None:
    told = {"role": "system", "content": "Be brief."}
    pair = {"prompt": ASKED["content"], "chosen": [*MORE, SAID], "rejected": [*MORE, WRONG]}
    [found] = read(tmp_path, "dpo", pair).train
    assert (found.prompt, found.chosen, found.rejected) == (MORE, [SAID], [WRONG])
    answers = {"prompt": ASKED["content"], "chosen": [*MORE[1:], SAID], "rejected": [*MORE[1:], WRONG]}
    assert read(tmp_path, "dpo", answers).train[0].prompt == MORE
    with_system = {"prompt": "Two plus two?", "chosen": [told, ASKED, SAID], "rejected": [told, ASKED, WRONG]}
    splits = read(tmp_path, "dpo", [with_system] * 3)
    assert splits.train[0].prompt == [told, ASKED]
    assert sum("in 3 rows 'prompt'" in note for note in splits.notes) == 1


WINNERS = [{"q": "Two plus two?", "a": "Four.", "b": "Five.", "labels": label} for label in (1, 0, 2)]
TWO = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ((1, 0, 2), {"a": 1, "b": 0, "tie": 2}),
        (("model_a", "model_b", "bad"), {"a": "model_a", "b": "model_b", "tie": ["tie", "bad"]}),
        ((-3, 1, 0), {"a": "negative", "b": "positive", "tie": 0}),
    ],
)
def test_a_winner_orders_two_answers(tmp_path: Path, values: tuple[Any, ...], rule: dict[str, Any]) -> None:
    rows = [row | {"labels": value} for row, value in zip(WINNERS, values, strict=True)]
    splits = read(tmp_path, "dpo", rows, TWO, preference=PreferenceConfig(winner="labels", **rule))
    assert [pair.chosen[0]["content"] for pair in splits.train] == ["Four.", "Five."]
    assert splits.counts["train"].ties == 1
    assert splits.counts["train"].read == 3
    with pytest.raises(DataError, match=r"data\.preference\.winner=labels is "):
        read(tmp_path, "dpo", rows, TWO, preference=PreferenceConfig(winner="labels", **(rule | {"tie": None})))


@pytest.mark.parametrize(
    ("stage", "row", "columns"),
    [
        ("dpo", WINNERS[0], TWO),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "c", "better_response": 2}, {}),
        ("dpo", {"q": "a", "x": "b", "y": "c", "score_x": 2}, {"prompt": "q", "chosen": "x", "rejected": "y"}),
        ("sft", {"prompt": "a", "completion": "b", "label": False}, {}),
        ("sft", {"messages": [ASKED, SAID], "rank": 3}, {}),
    ],
)
def test_a_column_that_would_decide_stops_the_run(tmp_path: Path, stage: str, row: Any, columns: Any) -> None:
    name = next(name for name in ("labels", "better_response", "score_x", "label", "rank") if name in row)
    with pytest.raises(ConfigError, match=rf"data\.ignored_columns=\[{name}\]"):
        read(tmp_path, stage, row, columns)
    assert read(tmp_path, stage, row, columns, ignored_columns=[name]).train


def test_two_readings_that_differ_stop_the_run(tmp_path: Path) -> None:
    row = {"messages": [ASKED, SAID], "instruction": "Two plus three?", "response": "Five."}
    with pytest.raises(
        ConfigError, match=r"ignored_columns=\[messages\] or data\.ignored_columns=\[instruction,response\]"
    ):
        read(tmp_path, "sft", row)
    assert read(tmp_path, "sft", row, ignored_columns=["messages"]).train[0].reference == "Five."
    assert read(tmp_path, "sft", row, ignored_columns=["instruction", "response"]).train[0].reference == "Four."
    assert read(tmp_path, "sft", row, {"messages": None}).train[0].reference == "Five."
    same = row | {"instruction": "Two plus two?", "response": "Four."}
    assert read(tmp_path, "sft", same).train[0].messages == [ASKED, SAID]


@pytest.mark.parametrize(
    ("stage", "row", "key"),
    [
        ("sft", {"text": "Some text."}, "data.columns.text=text"),
        ("sft", {"question": "a", "answer": "b"}, "data.columns.instruction=question data.columns.response=answer"),
        ("sft", {"prompt": "a", "chosen": "b", "rejected": "c"}, "data.columns.instruction=prompt"),
        ("sft", {"ask": "a", "say": "b"}, "data.columns.instruction=… data.columns.response=…"),
        ("dpo", {"question": "a", "answer_1": "b", "answer_2": "c", "preferred": 1}, "data.preference.winner=…"),
        ("sft", {"text": "a", "replies": [{"text": "b"}]}, "'replies'"),
        ("sft", {"messages": [ASKED, {**SAID, "content": [{"type": "image_url"}]}]}, "'image_url'"),
        ("sft", {"instruction": "a", "response": "b", "history": "c"}, "data.columns.history=null"),
        ("dpo", {"prompt": "a", "completion": "b", "label": True}, "stage=kto"),
        ("dpo", {"prompt": "a", "answers": [{"answer": "b", "rank": 1}, {"answer": "c", "rank": 2}]}, "'answers'"),
        ("dpo", {"q": "a", "human_ref_A": "b", "human_ref_B": "c"}, "data.columns.chosen="),
        ("dpo", {"question": "a", "chosen": "b", "rejected": "c"}, "data.columns.prompt=question"),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")}, "'margin'"),
        ("ppo", {"question": "a"}, "data.columns.prompt=question"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_to_do(tmp_path: Path, stage: str, row: Any, key: str) -> None:
    with pytest.raises(DataError) as error:
        read(tmp_path, stage, row)
    assert key in str(error.value)
    assert "rows.jsonl line 1" in str(error.value)
    with pytest.raises(DataError) as error:
        read(tmp_path, stage, [row] * 2, bad_rows="drop")
    assert key in str(error.value)  # the reason also stands where nothing is left


def test_what_is_left_unread_is_told_with_the_key_that_reads_it(tmp_path: Path) -> None:
    rows = [{"instruction": "Who?", "context": "Oda keeps the lamp.", "response": "Oda.", "category": "qa"}] * 2
    notes = read(tmp_path, "sft", rows).notes
    assert "column 'category' is ignored (2 rows)" in notes
    assert "column 'context' is ignored (2 rows); data.columns.input=context reads it" in notes
    messages = [{**ASKED, "id": 7}, SAID]
    assert "key 'id' of messages is ignored (1 times)" in read(tmp_path, "sft", {"messages": messages}).notes


def test_dotted_paths_reach_into_columns(tmp_path: Path) -> None:
    row = {"data": {"q": "Two plus two?", "a": "Four."}, "meta": {"told": "Be brief."}}
    columns = {"instruction": "data.q", "response": "data.a", "system": "meta.told"}
    messages = read(tmp_path, "sft", row, columns).train[0].messages
    assert messages == [{"role": "system", "content": "Be brief."}, ASKED, SAID]


def test_files_of_each_ending_and_lines_in_json(tmp_path: Path) -> None:
    line = json.dumps({"messages": [ASKED, SAID]})
    (tmp_path / "a.JSONL").write_text(f"{line}\n")
    (tmp_path / "b.json").write_text(f"{line}\n{line}\n")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(f"{line}\n")
    names = [str(tmp_path / name) for name in ("a.JSONL", "b.json", "c.jsonl.gz")]
    assert len(splits_of(instructions, data_config(names, "sft")).train) == 4
    (tmp_path / "c.jsonl.gz").write_bytes((tmp_path / "c.jsonl.gz").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"c\.jsonl\.gz"):
        splits_of(instructions, data_config(names, "sft"))
    (tmp_path / "d.json").write_text('{"rows": [\n1]}')
    with pytest.raises(DataError, match="list of objects"):
        splits_of(instructions, data_config(str(tmp_path / "d.json"), "sft"))


TALK = [ASKED, SAID]
COLUMNS_OF: dict[str, dict[str, Any]] = {
    "HuggingFaceH4/ultrachat_200k": {"prompt": "Two plus two?", "prompt_id": "a1", "messages": TALK},
    "allenai/tulu-3-sft-mixture": {"id": "a1", "messages": TALK, "source": "made"},
    "teknium/OpenHermes-2.5": {
        **{"conversations": sharegpt(TALK), "source": "made", "custom_instruction": None, "category": None},
        **{"system_prompt": None, "model_name": None, "rank": None, "skip_prompt_formatting": False},
    },
    "tatsu-lab/alpaca": {"instruction": "Two plus two?", "input": "", "output": "Four.", "text": "Below is …"},
    "databricks/databricks-dolly-15k": {
        **{"instruction": "Two plus two?", "context": "", "response": "Four.", "category": "open_qa"}
    },
    "Salesforce/xlam-function-calling-60k": {
        **{"id": 0, "query": "Two plus two?", "answers": json.dumps([CALL["function"]])},
        "tools": json.dumps([{"name": "add", "description": "Adds.", "parameters": {"a": {"type": "int"}}}]),
    },
    "HuggingFaceH4/ultrafeedback_binarized": {
        **{"prompt": "Two plus two?", "prompt_id": "a1", "chosen": TALK, "rejected": [ASKED, WRONG]},
        **{"messages": TALK, "score_chosen": 8.0, "score_rejected": 5.0},
    },
    "Intel/orca_dpo_pairs": {"system": "", "question": "Two plus two?", "chosen": "Four.", "rejected": "Five."},
    "Anthropic/hh-rlhf": {
        side: f"\n\nHuman: Two plus two?\n\nAssistant: {said['content']}"
        for side, said in (("chosen", SAID), ("rejected", WRONG))
    },
    "stanfordnlp/SHP": {
        **{
            "post_id": "p",
            "domain": "made",
            "history": "Two plus two?",
            "human_ref_A": "Five.",
            "human_ref_B": "Four.",
        },
        **{"labels": 0, "score_A": 3, "score_B": 9, "score_ratio": 3.0, "upvote_ratio": 0.9},
    },
    "nvidia/HelpSteer3": {
        **{"domain": "made", "language": "english", "context": [ASKED], "response1": "Five.", "response2": "Four."},
        **{"overall_preference": 2, "individual_preference": [{"score": 2, "reasoning": "right"}]},
    },
    "openai/gsm8k": {"question": "Two plus two?", "answer": "#### 4"},
}
DOCUMENTED = {
    found[1]: (found[2], re.findall(r"data\.\S+=[^\s`]+", found[3]))
    for found in re.finditer(
        r"^\| `(\S+/\S+)` \| (\w+) \|(.*)\|$", (ROOT / "docs" / "data.md").read_text(), flags=re.MULTILINE
    )
}


def test_the_page_shows_these_public_sets() -> None:
    assert DOCUMENTED.keys() == COLUMNS_OF.keys()


@pytest.mark.parametrize("name", COLUMNS_OF)
def test_a_public_set_is_read_with_the_keys_of_the_page(tmp_path: Path, name: str) -> None:
    stage, keys = DOCUMENTED[name]
    composed = check(compose_config([f"stage={stage}", "data.dataset_name=rows", *keys], None)).data
    assert composed.dataset_name == "rows"
    path = write_rows(tmp_path / "rows.jsonl", [COLUMNS_OF[name]] * 2)
    local = {"dataset_name": str(path), "dataset_train_split": "train", "dataset_test_split": None, "test_size": 0.0}
    splits = splits_of(READERS[stage], dataclasses.replace(composed, **local))
    row = splits.train[0]
    assert row.prompt[-1] == ASKED
    if stage in ("dpo", "reward"):
        assert (row.chosen, row.rejected) == ([SAID], [WRONG])
    elif stage == "sft":
        assert row.messages[-1] == (SAID if "xlam" not in name else {**SAID, "content": "", "tool_calls": [CALL]})


def text_of(messages: list[dict[str, Any]]) -> str:
    return json.dumps(messages)


def test_messages_as_json_text_are_messages_in_every_column(tmp_path: Path) -> None:
    pair = {"prompt": text_of([ASKED]), "chosen": text_of([SAID]), "rejected": text_of([WRONG])}
    [found] = read(tmp_path, "dpo", pair).train
    assert (found.prompt, found.chosen, found.rejected) == ([ASKED], [SAID], [WRONG])
    whole = {"chosen": text_of([ASKED, SAID]), "rejected": text_of([ASKED, WRONG])}
    assert read(tmp_path, "dpo", whole).train[0].prompt == [ASKED]
    assert read(tmp_path, "ppo", {"prompt": text_of([ASKED])}).train[0].prompt == [ASKED]
    assert read(tmp_path, "sft", {"prompt": text_of([ASKED]), "completion": "Four."}).train[0].messages == [ASKED, SAID]
    # what only looks like it is text
    listed = json.dumps([{"role": "manager", "name": "Ann"}])
    assert read(tmp_path, "sft", {"instruction": "Who?", "response": listed}).train[0].reference == listed


def test_other_names_of_keys_hold_for_pairs_too(tmp_path: Path) -> None:
    pair = {"prompt": "Two plus two?", "chosen": [{"role": "bot", "content": "Four."}], "rejected": "Five."}
    messages = MessagesConfig(role=None, content=None, roles={"bot": "assistant"}, train=None)
    assert read(tmp_path, "dpo", pair, messages=messages).train[0].chosen == [SAID]


def test_a_sign_orders_the_answers_and_not_the_margin(tmp_path: Path) -> None:
    rows = [{"q": "Two plus two?", "a": "Four.", "b": "Five.", "p": value} for value in (-2, 3)]
    rule = PreferenceConfig(winner="p", a="negative", b="positive", tie=None)
    splits = read(tmp_path, "dpo", rows, TWO | {"margin": "p"}, preference=rule)
    assert [(pair.chosen[0]["content"], pair.margin) for pair in splits.train] == [("Four.", 2.0), ("Five.", 3.0)]


def test_history_goes_before_what_it_belongs_to_and_carries_the_same_loss(tmp_path: Path) -> None:
    row = {"prompt": "And one more?", "completion": "Five.", "history": [["Two plus two?", "Four."]]}
    messages = read(tmp_path, "sft", row).train[0].messages
    assert [message.get("train", True) for message in messages] == [True, False, True, True]
    pair = {"chosen": [MORE[2], SAID], "rejected": [MORE[2], WRONG], "history": [["Two plus two?", "Four."]]}
    assert read(tmp_path, "dpo", pair).train[0].prompt == MORE


def test_calls_of_llama_factory_and_calls_in_the_text(tmp_path: Path) -> None:
    talk = [
        *sharegpt([ASKED]),
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "Four."},
    ]
    messages = read(tmp_path, "sft", {"conversations": talk}).train[0].messages
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert messages[2]["role"] == "tool"
    hermes = [
        ASKED,
        {"role": "assistant", "content": "<tool_call>\n{}\n</tool_call>"},
        {"role": "tool", "content": "4"},
    ]
    assert (
        read(tmp_path, "sft", {"messages": [*hermes, SAID]}).train[0].messages[1]["content"].startswith("<tool_call>")
    )


@pytest.mark.parametrize(
    ("stage", "row", "columns", "told"),
    [
        ("sft", {"messages": [{"role": "system", "content": ""}]}, {}, "empty system message"),
        ("sft", {"instruction": "q", "response": "a", "history": [["x", "y"], None]}, {}, "data.columns.history=null"),
        ("sft", {"instruction": "q", "response": "a", "history": [["x", "y", "z"]]}, {}, "data.columns.history=null"),
        ("sft", {"text": "words", "system": "Be kind."}, {"text": "text"}, "data.columns.system=null"),
        ("sft", {"messages": [ASKED, {**SAID, "weight": 1, "train": False}]}, {}, "contradict"),
        ("sft", {"messages": [ASKED, {**SAID, "train_on_turn": False}]}, {}, "data.messages.train=train_on_turn"),
        ("sft", {"messages": [ASKED, {"role": "assistant", "content": None}]}, {}, "null for content"),
        ("dpo", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 10**400}, {}, "'margin'"),
    ],
)
def test_odd_rows_are_refused_by_name(tmp_path: Path, stage: str, row: Any, columns: Any, told: str) -> None:
    with pytest.raises(DataError, match=re.escape(told)):
        read(tmp_path, stage, row, columns)


def test_keys_that_no_row_has_are_refused(tmp_path: Path) -> None:
    row = {"messages": [ASKED, SAID]}
    with pytest.raises(ConfigError, match="scor"):
        read(tmp_path, "sft", row, ignored_columns=["scor"])
    with pytest.raises(ConfigError, match="wieght"):
        read(tmp_path, "sft", row, messages=MessagesConfig(role=None, content=None, roles={}, train="wieght"))


def test_a_csv_file_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.csv").write_text("instruction,response,response\nq,good,bad\n")
    with pytest.raises(DataError, match="'response'"):
        splits_of(instructions, data_config(str(tmp_path / "twice.csv"), "sft"))


def test_columns_of_any_type_reach_reward_functions(tmp_path: Path) -> None:
    import datetime

    import pyarrow
    import pyarrow.parquet

    when = datetime.datetime(2026, 7, 3)
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": ["q"], "when": [when], "raw": [b"\x00"]}), tmp_path / "rows.parquet"
    )
    [row] = splits_of(prompts, data_config(str(tmp_path / "rows.parquet"), "ppo")).train
    assert row.columns == {"when": when, "raw": b"\x00"}
    assert row.content


def test_the_hints_can_be_followed(tmp_path: Path) -> None:
    pair = {"prompt": "Two plus two?", "chosen": "Four.", "rejected": "Five."}
    mapped = {"instruction": "prompt", "response": "chosen"}
    assert read(tmp_path, "sft", pair, mapped).train[0].messages == [ASKED, SAID]
    whole = {"chosen": [ASKED, SAID], "rejected": [ASKED, WRONG]}
    assert read(tmp_path, "sft", whole, {"messages": "chosen"}).train[0].messages == [ASKED, SAID]
    with pytest.raises(DataError, match="did you mean reply"):
        read(tmp_path, "sft", {"q": "a", "reply": "b"}, {"instruction": "q", "response": "replyy"})
    scored = {"q": "a", "x": "b", "y": "c", "score_x": 2, "score_y": 1}
    with pytest.raises(ConfigError, match=r"set data\.ignored_columns=\[score_x,score_y\]"):
        read(tmp_path, "dpo", scored, {"prompt": "q", "chosen": "x", "rejected": "y"})
