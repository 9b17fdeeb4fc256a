"""What is kept with a chat template, which completions carry loss, and what a template that drops words is told."""

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers_for_tests as made
from conftest import Posttrain, same_weights, write_rows

from posttrain.data.chat import IGNORED, ChatEncoder
from posttrain.data.splits import TemplateInputs
from posttrain.data.template import keep_in_template, plain_template
from posttrain.errors import ConfigError
from posttrain.runs.folder import first_begun

DAY = datetime.datetime(2026, 7, 3, 4, 5)
DATED = "{{ strftime_now('%d %b %Y') }} {{ enable_thinking }}\n" + made.CHATML
ASKED = {"role": "user", "content": "Q1"}
TALK = [ASKED, {"role": "assistant", "content": "A1"}, {"role": "user", "content": "Q2"}]
TALK += [{"role": "assistant", "content": "A2"}]


def kept(template: str, options: dict[str, Any] | None = None) -> Any:
    tokenizer = made.chatml()
    tokenizer.chat_template = template
    keep_in_template(tokenizer, DAY, options or {})
    return tokenizer


def text(tokenizer: Any, **options: Any) -> str:
    return str(tokenizer.apply_chat_template(TALK, tokenize=False, **options))


def test_date_and_arguments_stay_with_the_template() -> None:
    tokenizer = kept(DATED, {"enable_thinking": False})
    assert text(tokenizer).startswith("03 Jul 2026 False\n<|im_start|>")
    assert text(tokenizer, enable_thinking=True).startswith("03 Jul 2026 True\n")
    assert ChatEncoder(tokenizer).render(TALK) == text(tokenizer)
    # a later stage, on another day, changes what it names and nothing else
    keep_in_template(tokenizer, DAY + datetime.timedelta(days=400), {})
    assert text(tokenizer).startswith("03 Jul 2026 False\n")
    keep_in_template(tokenizer, DAY + datetime.timedelta(days=400), {"enable_thinking": True})
    assert text(tokenizer).startswith("03 Jul 2026 True\n")
    assert text(kept(made.CHATML)) == text(made.chatml())
    assert kept(made.CHATML).chat_template == made.CHATML
    with pytest.raises(ConfigError, match=r"data\.chat_template_kwargs\.enable_thinkin "):
        kept(DATED, {"enable_thinkin": False})


def test_a_row_has_arguments_of_its_own() -> None:
    encoder = ChatEncoder(kept(DATED, {"enable_thinking": False}))
    own = encoder.segments(TALK, TemplateInputs([], {"enable_thinking": True}))
    assert own[0].text.startswith("03 Jul 2026 True\n")
    assert encoder.segments(TALK)[0].text.startswith("03 Jul 2026 False\n")


def test_all_stages_of_a_run_have_the_day_of_the_first(
    posttrain: Posttrain, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "dated.jinja"
    template.write_text(DATED)
    began = tmp_path / "outputs" / "demo" / "reward"
    began.mkdir(parents=True)
    (began / "run.json").write_text(json.dumps({"begun": DAY.isoformat()}))
    assert first_begun(began.parent) == DAY
    assert first_begun(tmp_path).date() == datetime.datetime.now().date()
    command = (f"data.dataset_name={rows}", "trainer.max_steps=2", f"model.chat_template_path={template}")
    options = "data.chat_template_kwargs={enable_thinking: true}"
    done = posttrain(*command, options)
    assert done.code == 0, done
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained("outputs/demo/sft/model")
    assert text(saved).startswith("03 Jul 2026 True\n")
    assert json.loads(Path("outputs/demo/sft/run.json").read_text())["begun"] == DAY.isoformat()
    again = posttrain(*command, options)
    assert again.code == 0
    assert "already complete" in again.out
    other = posttrain(*command, "data.chat_template_kwargs={enable_thinking: false}")
    assert other.code == 2
    assert "chat_template_kwargs" in other.err


def test_resumed_on_another_day_it_ends_with_the_same_weights(posttrain: Posttrain, rows: Path, tmp_path: Path) -> None:
    """The template writes the second, so that every moment is another day."""
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%Y-%m-%d %H:%M:%S') }}\n" + made.CHATML)
    command = [f"data.dataset_name={rows}", "trainer.max_steps=4", "trainer.save_steps=2", "stage.learning_rate=1e-3"]
    command.append(f"model.chat_template_path={template}")
    assert posttrain(*command).code == 0
    straight, resumed = Path("outputs/demo/sft"), Path("outputs/killed/sft")
    shutil.copytree(straight, resumed)  # what a kill after step 2 leaves
    (resumed / "posttrain.json").unlink()
    for folder in ("model", "checkpoint-4"):
        shutil.rmtree(resumed / folder)
    done = posttrain(*command, "run_name=killed")
    assert done.code == 0, done
    assert "resuming from checkpoint-2" in done.out
    assert same_weights(straight / "model", resumed / "model")
    assert posttrain(*command, "run_name=later").code == 0
    assert not same_weights(straight / "model", Path("outputs/later/sft/model"))


def test_one_completion_or_those_that_the_row_names_carry_loss() -> None:
    encoder = ChatEncoder(made.chatml())
    tokenizer = encoder.tokenizer
    skipped = [TALK[0], TALK[1] | {"train": False}, *TALK[2:]]
    for messages, train_on in ((TALK, "last"), (skipped, "all")):
        [(ids, labels)] = encoder.encode([encoder.segments(messages, train_on=train_on)])
        assert tokenizer.decode([label for label in labels if label != IGNORED]) == "A2<|im_end|>"
        assert ids[: len(encoder.prompt_ids(TALK[:-1]))] == encoder.prompt_ids(TALK[:-1])
    first = [TALK[0], TALK[1], TALK[2], TALK[3] | {"train": False}]
    [(_, labels)] = encoder.encode([encoder.segments(first)])
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "A1<|im_end|>"
    with pytest.raises(ValueError, match=r"data\.messages\.train"):
        encoder.segments([ASKED, TALK[1] | {"train": False}])


class Counting(ChatEncoder):
    """How often its template is rendered."""

    renders = 0

    def _render(self, *arguments: Any, **keywords: Any) -> Any:
        self.renders += 1
        return super()._render(*arguments, **keywords)


def test_plain_conversations_are_rendered_once_each() -> None:
    encoder = Counting(made.chatml())
    encoder.segments(TALK)
    for number in range(3):
        before = encoder.renders
        encoder.segments([message | {"content": f"{message['content']} {number}"} for message in TALK])
        assert encoder.renders == before + 1
    # the words of one look like the template's own: its place is told turn by turn
    trap = [ASKED, {"role": "assistant", "content": "A\n### Response:\n"}]
    tokenizer = made.gpt2_like()
    tokenizer.chat_template = plain_template(tokenizer)
    plain = Counting(tokenizer)
    plain.segments([ASKED, trap[1] | {"content": "A"}])
    before = plain.renders
    assert [piece.text for piece in plain.segments(trap) if piece.is_response] == ["A\n### Response:\n<|endoftext|>"]
    assert plain.renders > before + 1


LOSSY = {
    "the system message": "{% for m in messages if m.role != 'system' %}",
    "a thought": "{% for m in messages %}",
}


@pytest.mark.parametrize("dropped", LOSSY)
def test_a_template_that_drops_words_is_refused(dropped: str) -> None:
    tokenizer = made.chatml()
    body = "<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    asks = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer.chat_template = LOSSY[dropped] + body + asks
    encoder = ChatEncoder(tokenizer)
    told = [{"role": "system", "content": "Told"}] if dropped == "the system message" else []
    thinks = {"role": "assistant", "content": "<think>Mused</think>A1"}
    with pytest.raises(ValueError, match="'Told'" if told else "'Mused'"):
        encoder.segments([*told, ASKED, thinks if not told else TALK[1]])
    # what an earlier turn thought is no part of a prompt, in training as in generation
    if not told:
        [prompt, answer] = encoder.segments([ASKED, thinks, *TALK[2:]], train_on="last")
        assert "Mused" not in prompt.text
        assert answer.text == "A2<|im_end|>"
        assert prompt.text == encoder.render([ASKED, thinks, TALK[2]], add_generation_prompt=True)


def test_tools_and_calls_need_a_template_that_writes_them() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    encoder = ChatEncoder(made.chatml())
    with pytest.raises(ValueError, match=r"data\.columns\.tools=null"):
        encoder.segments(TALK, TemplateInputs([tool], {}))
    called = [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "1"}]
    with pytest.raises(ValueError, match=r"model\.chat_template_path"):
        encoder.segments([*called, TALK[1]])


def test_the_developer_is_the_system_where_the_template_knows_no_developer() -> None:
    developer = {"role": "developer", "content": "Told"}
    encoder = ChatEncoder(made.chatml())
    assert encoder.render([developer, ASKED]).startswith("<|im_start|>system\nTold")
    named = made.chatml()
    named.chat_template = "{# developer #}" + made.CHATML
    assert ChatEncoder(named).render([developer, ASKED]).startswith("<|im_start|>developer\nTold")


@pytest.mark.parametrize("kind", ["plain", "chatml", "llama"])
def test_a_reward_model_reads_the_text_that_transformers_renders(kind: str) -> None:
    from posttrain.data.template import plain_template

    tokenizer = {"plain": made.gpt2_like, "chatml": made.chatml, "llama": made.llama_like}[kind]()
    tokenizer.chat_template = tokenizer.chat_template or plain_template(tokenizer)
    encoder = ChatEncoder(tokenizer)
    tail, end = encoder.end_of_text()
    read = tokenizer(text(tokenizer).removesuffix(tail) + end, add_special_tokens=False).input_ids
    assert encoder.conversation_ids(TALK) == read
    assert kind != "plain" or (tail, end) == ("", "")  # nothing stands after EOS: all of the text is read


def test_raw_text_carries_loss_on_every_token(posttrain: Posttrain, tmp_path: Path) -> None:
    texts = write_rows(tmp_path / "text.jsonl", [{"text": f"The year {year} was long."} for year in range(40)])
    done = posttrain(f"data.dataset_name={texts}", "data.columns.text=text", "trainer.max_steps=2")
    assert done.code == 0, done
    assert json.loads(Path("outputs/demo/sft/posttrain.json").read_text())["metrics"]["eval_loss"] > 0
    tokenizer = made.gpt2_like()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    [(ids, labels)] = (encoder := ChatEncoder(tokenizer)).encode([encoder.raw_text("The year")])
    assert ids == labels
    assert tokenizer.decode(ids) == "The year<|endoftext|>"


def test_each_of_several_calls_has_to_be_written() -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": value}}} for value in ("x1", "x2")]
    tokenizer = made.chatml()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% if m.tool_calls %}"
        "{{ m.tool_calls[0].function.name }}({{ m.tool_calls[0].function.arguments }}){% endif %}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = ChatEncoder(tokenizer)
    talk = [ASKED, {"role": "assistant", "content": "", "tool_calls": calls[:1]}]
    assert "x1" in encoder.segments(talk)[-1].text
    talk[1]["tool_calls"] = calls
    with pytest.raises(ValueError, match="tool call"):
        encoder.segments(talk)


def test_a_mark_around_the_words_alone_reaches_to_the_end_of_the_turn() -> None:
    tokenizer = made.chatml()
    tokenizer.chat_template = made.CHATML.replace(
        "message['content'] + '<|im_end|>\\n' }}",
        "'' }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\\n' }}",
    )
    learned = [segment.text for segment in ChatEncoder(tokenizer).segments(TALK) if segment.is_response]
    assert learned == ["A1<|im_end|>", "A2<|im_end|>"]


def test_every_format_of_a_date_is_that_of_the_run() -> None:
    formats = "%F", "%e %b %Y", "%-I %p"
    written = kept("".join(f"{{{{ strftime_now('{each}') }}}}|" for each in formats) + made.CHATML)
    assert text(written).startswith("".join(f"{DAY.strftime(each)}|" for each in formats))
    with pytest.raises(ConfigError, match="messages"):
        kept(made.CHATML, {"messages": "x"})


def test_an_end_that_the_template_does_not_put_is_told(posttrain: Posttrain, rows: Path, tmp_path: Path) -> None:
    turns = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
    template = turns + "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    (tmp_path / "endless.jinja").write_text(template)
    words = ("stage=sft", f"data.dataset_name={rows}", "dry_run=true")
    for more, told in (((), 0), (("model.chat_template_path=endless.jinja",), 1)):
        done = posttrain(*words, *more)
        assert done.code == 0, done
        assert done.out.count("puts no end behind a response") == told
