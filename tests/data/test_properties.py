"""What must hold for any input: the label mask, data reading, advantages, and the composition of a configuration."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tokenizers_for_tests as made
from conftest import data_config, splits_of
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import configure
from posttrain.data.chat import IGNORED, ChatEncoder, Segment
from posttrain.data.formats import instructions
from posttrain.data.template import plain_template
from posttrain.errors import ConfigError, DataError

ANY = settings(max_examples=150, deadline=None)
# any character but surrogates, which are none, and the one that tokenizers of transformers put nowhere; and no control
# token, which Hypothesis finds in this file
TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40).filter(
    lambda text: bool(text.strip()) and "<|" not in text
)


def encoders() -> dict[str, ChatEncoder]:
    plain = made.gpt2_like()
    plain.chat_template = plain_template(plain)
    return {"plain": ChatEncoder(plain), "chatml": ChatEncoder(made.chatml())}


ENCODERS = encoders()


@ANY
@given(st.sampled_from(sorted(ENCODERS)), st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_responses_and_their_ends_carry_loss_and_nothing_else(kind: str, turns: list[tuple[str, str]]) -> None:
    encoder = ENCODERS[kind]
    tokenizer = encoder.tokenizer
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    refused = ""
    try:
        segments = encoder.segments(messages)
    except ValueError as error:
        refused = str(error)
    if refused:  # a template that changes an answer is refused, never trained wrongly
        assert "special token" in refused or "template" in refused
        return
    [(ids, labels)] = encoder.encode([segments])
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    # byte-level tokenizers give back every byte: the row is the rendered text, the learned part the answers
    assert tokenizer.decode(ids) == "".join(segment.text for segment in segments)
    learned = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    responses = [segment.text for segment in segments if segment.is_response]
    assert tokenizer.decode(learned) == "".join(responses)
    assert len(responses) == len(turns)
    for (_, answer), response in zip(turns, responses, strict=True):
        assert response.endswith(encoder.end_of_turn)
        assert answer.strip() in response
    assert labels[-1] == encoder.end_id
    # what is asked at generation is what stood before the answer in training
    asked = encoder.prompt_ids(messages[:-1])
    assert ids[: len(asked)] == asked


SPACED = made.llama_like()
SPACED.chat_template = plain_template(SPACED)
SPACED_ENCODER = ChatEncoder(SPACED)
WORDS = st.lists(st.text(st.sampled_from("\n\n\n :aoneswr1?"), min_size=1, max_size=12), min_size=1, max_size=4)


@ANY
@given(st.lists(WORDS, min_size=1, max_size=4))
def test_a_batch_has_the_ids_of_each_text_behind_the_first_anchor_that_splits_off(batch: list[list[str]]) -> None:
    """A tokenizer that begins every text with a space: one text at a time, as it is defined."""

    def ids(text: str) -> list[int]:
        return list(SPACED(text, add_special_tokens=False).input_ids)

    def behind(text: str) -> list[int] | None:
        splits = (a for a in ("\n", ":", "a") if ids(a + text)[: len(ids(a))] == ids(a))
        anchor = next(splits, None)
        return None if anchor is None else ids(anchor + text)[len(ids(anchor)) :]

    rows = [[Segment(text, number % 2 == 1) for number, text in enumerate(texts)] for texts in batch]
    expected = [[ids(texts[0]), *map(behind, texts[1:])] for texts in batch]
    if any(piece is None for pieces in expected for piece in pieces):
        with pytest.raises(ValueError, match="merges the beginning"):
            SPACED_ENCODER.encode(rows)
        return
    for pieces, (found, labels) in zip(expected, SPACED_ENCODER.encode(rows), strict=True):
        assert found == [token for piece in pieces for token in piece or ()]
        learned = [token for piece in pieces[1::2] for token in piece or ()]
        assert [label for label in labels if label != IGNORED] == learned


# pieces of a template: text around a question, before an answer, between an answer and the token that ends it
PIECE = st.text("ab <>#:|[]\n\t", max_size=5)
ENDS = ("<|im_end|>", "<|endoftext|>", "")


def template(before: str, after: str, opening: str, gap: str, end: str, tail: str, earlier: str) -> str:
    """`earlier` ends a completion that is not the last."""
    question = f"{{{{ {json.dumps(before)} + message['content'] + {json.dumps(after)} }}}}"
    ends = f"({json.dumps(end)} if loop.last else {json.dumps(earlier)})"
    answer = f"{{{{ {json.dumps(opening)} + message['content'] + {json.dumps(gap)} + {ends} + {json.dumps(tail)} }}}}"
    return (
        f"{{% for message in messages %}}{{% if message['role'] == 'user' %}}{question}{{% else %}}{answer}"
        f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {json.dumps(opening)} }}}}{{% endif %}}"
    )


@settings(ANY, max_examples=60)
@given(
    st.tuples(PIECE, PIECE, PIECE, PIECE, st.sampled_from(ENDS), PIECE, st.sampled_from([*ENDS, None])),
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3),
)
def test_the_mask_is_right_with_any_template(pieces: tuple[str, ...], turns: list[tuple[str, str]]) -> None:
    """What is learned is worked out here from the template's pieces, not from what it renders.

    A conversation of the same roles comes before, after which nothing but the whole is rendered.
    """
    before, after, opening, gap, end, tail, other = pieces
    earlier = end if other is None else other
    tokenizer = made.chatml()
    tokenizer.chat_template = template(before, after, opening, gap, end, tail, earlier)
    encoder = ChatEncoder(tokenizer)
    assert encoder.end_of_turn == (end or "<|endoftext|>")
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    # without an end after the last completion, text that follows the ends of earlier ones may belong to either
    cannot_tell = not earlier or (not end and tail.strip())
    if cannot_tell and len(turns) > 1:
        with pytest.raises(ValueError, match=r"data\.train_on=last"):
            encoder.segments(messages)
        assert encoder.segments(messages, train_on="last")[-1].text.endswith(end or "<|endoftext|>")
        return
    encoder.segments([{**message, "content": "xyz"} for message in messages])
    [(ids, labels)] = encoder.encode([encoder.segments(messages)])
    expected = [
        (piece, learned)
        for number, (question, answer) in enumerate(turns)
        for piece, learned in (
            (("" if number == 0 else tail) + before + question + after + opening, False),
            (answer + gap + earlier, True)
            if number < len(turns) - 1
            else (answer + gap + end if end else (answer + gap + tail).rstrip() + "<|endoftext|>", True),
        )
    ]
    for wanted in (False, True):
        kept = [token for token, label in zip(ids, labels, strict=True) if (label != IGNORED) == wanted]
        assert tokenizer.decode(kept) == "".join(piece for piece, learned in expected if learned == wanted)
    assert tokenizer.decode(ids) == "".join(piece for piece, _ in expected)


@ANY
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8))
def test_rows_are_read_as_they_were_written(rows: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        written = [{"instruction": question, "response": answer} for question, answer in rows]
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written), encoding="utf-8")
        read = splits_of(instructions, data_config(str(file), "sft"))
    assert [tuple(message["content"] for message in row.messages) for row in read.train] == rows
    assert read.counts["train"].read == len(rows)


BROKEN = [
    '{"instruction": "a"}',
    '{"instruction": "a", "response": ""}',
    '{"instruction": "a", "response": 5}',
    '{"instruction": "a", "response": null}',
    '{"instruction": "a", "response": "b"',
    '["a", "b"]',
    '{"instruction": "a", "response": ["b"]}',
]


@ANY
@given(st.integers(0, 6), st.integers(0, 6), st.sampled_from(BROKEN))
def test_a_broken_row_is_named_wherever_it_stands(before: int, after: int, broken: str) -> None:
    good = json.dumps({"instruction": "a", "response": "b"})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("\n".join([good] * before + [broken] + [good] * after) + "\n", encoding="utf-8")
        with pytest.raises(DataError, match=f"line {before + 1}\\b"):
            splits_of(instructions, data_config(str(file), "sft"))


NUMBERS = st.floats(-5, 5, width=32)


@ANY
@given(st.data(), st.integers(1, 4), st.integers(1, 6), st.floats(0, 1), st.floats(0, 1))
def test_advantages_are_those_of_a_naive_loop(
    data: st.DataObject, rows: int, tokens: int, gamma: float, lam: float
) -> None:
    import torch

    from posttrain.rlhf.losses import generalised_advantages

    table = st.lists(st.lists(NUMBERS, min_size=tokens, max_size=tokens), min_size=rows, max_size=rows)
    rewards, values = data.draw(table), data.draw(table)
    lengths = data.draw(st.lists(st.integers(0, tokens), min_size=rows, max_size=rows))
    mask = torch.tensor([[float(at < length) for at in range(tokens)] for length in lengths], dtype=torch.float64)
    found, returns = generalised_advantages(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(values, dtype=torch.float64), mask, gamma, lam
    )
    for row, length in enumerate(lengths):
        for at in range(tokens):
            expected = sum(
                (gamma * lam) ** (later - at)
                * (
                    rewards[row][later]
                    + gamma * (values[row][later + 1] if later + 1 < length else 0.0)
                    - values[row][later]
                )
                for later in range(at, length)
            )
            assert float(found[row, at]) == pytest.approx(expected if at < length else 0.0, abs=1e-9)
            total = expected + values[row][at] if at < length else 0.0
            assert float(returns[row, at]) == pytest.approx(total, abs=1e-9)


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "stage.learning_rate": st.floats(1e-8, 1, exclude_min=True),
    "stage.batch_size": st.integers(1, 10**6),
    "stage.beta": st.floats(1e-6, 100),
    "stage.max_length": st.integers(2, 10**6),
    "model.lora_r": st.integers(1, 4096),
    "seed": st.integers(0, 2**32 - 1),
    "run_name": st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z").filter(lambda name: not _is_yaml(name)),
    "trainer.weight_decay": st.floats(0, 10),
}


def _is_yaml(text: str) -> bool:
    """Whether Hydra reads something else than a text."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return not isinstance(OverridesParser.create().parse_override(f"a={text}").value(), str)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_what_is_asked_for_is_what_is_composed(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(VALUES)), unique=True))
    asked = {name: data.draw(VALUES[name]) for name in names}
    config = configure("stage=dpo", *(f"{name}={value}" for name, value in asked.items()))
    for name, value in asked.items():
        section, _, key = name.rpartition(".")
        found = getattr(config, section) if section else config
        assert (found[key] if isinstance(found, dict) else vars(found)[key]) == value


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(VALUES)), st.data())
def test_a_misspelt_key_is_never_taken(name: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(1, len(name) - 1))
    misspelt = name[:at] + data.draw(st.sampled_from("xyz_")) + name[at:]
    with pytest.raises(ConfigError):
        configure("stage=dpo", f"++{misspelt}={data.draw(VALUES[name])}")
