"""Language models as judges, asked over HTTP on this machine: what is sent, cached, retried, counted and refused."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, write_rows

from posttrain import judges
from posttrain.errors import ConfigError, PosttrainError
from posttrain.judges import A_SCORE, A_VERDICT, Judge

PROMPTS = [[{"role": "user", "content": f"Say {n}."}] for n in range(3)]
COMPLETIONS = [[{"role": "assistant", "content": text}] for text in ("one", "a longer one", "two")]


class Endpoint:
    """A server that answers each request with `reply`, given its body; what it was sent is kept."""

    def __init__(self, reply: Callable[[dict[str, Any]], tuple[int, Any]]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.bodies.append(body)
                endpoint.paths.append(self.path)
                endpoint.keys.append(self.headers["Authorization"])
                code, answer = reply(body)
                self.send_response(code)
                self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@contextmanager
def served(reply: Callable[[dict[str, Any]], tuple[int, Any]]) -> Iterator[Endpoint]:
    endpoint = Endpoint(reply)
    thread = threading.Thread(target=endpoint.server.serve_forever, daemon=True)
    thread.start()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


def said(text: str) -> tuple[int, Any]:
    usage = {"prompt_tokens": 10, "completion_tokens": 2}
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}


def asked(body: dict[str, Any], tag: str) -> str:
    """What stands between the tags of a request."""
    text: str = body["messages"][0]["content"]
    return text.split(f"<{tag}>\n")[1].split(f"\n</{tag}>")[0]


def prefers_longer(body: dict[str, Any]) -> tuple[int, Any]:
    a, b = asked(body, "completion_A"), asked(body, "completion_B")
    return said(f"Verdict: A would be hasty.\nVerdict: **{'A' if len(a) > len(b) else 'B'}**")


def test_a_score_is_read_counted_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    replies = {"one": "Short.\nScore: 3", "a longer one": "Score: 10/10", "two": "I would rather not."}
    with served(lambda body: said(replies[asked(body, "completion")])) as endpoint:
        judge = Judge("m", endpoint.url, cache=tmp_path)
        assert judge.score(PROMPTS, COMPLETIONS) == [3.0, 10.0, None]
        assert judge.score(PROMPTS, COMPLETIONS) == [3.0, 10.0, None]
        other = Judge("m", endpoint.url, rubric="Be harsh.", cache=tmp_path)
        assert other.score(PROMPTS[:1] * 2, COMPLETIONS[:1] * 2) == [3.0, 3.0]
    # a reply that cannot be read is asked for again
    counts = {"requests": 4, "replies from the cache": 2, "prompt tokens": 40, "completion tokens": 8}
    assert judge.counts == {**counts, "replies that could not be read": 2}
    assert other.counts["requests"] == 1  # another rubric is another request, and two equal ones are one
    assert set(endpoint.paths) == {"/v1/chat/completions"}
    assert set(endpoint.keys) == {"Bearer secret"}
    assert {asked(body, "conversation") for body in endpoint.bodies} == {f"[user]\nSay {n}." for n in range(3)}
    kept = list(tmp_path.iterdir())
    assert len(kept) == 3
    assert not any("secret" in file.read_text() for file in kept)


def test_a_win_holds_in_both_orders(tmp_path: Path) -> None:
    reference = ["longer than one", "short", "two"]
    with served(prefers_longer) as endpoint:
        judge = Judge("m", endpoint.url, cache=tmp_path)
        assert judge.pairwise(PROMPTS, COMPLETIONS, reference=reference) == [0.0, 1.0, 0.5]
        assert judge.counts["requests"] == 4  # equal completions are a tie that nobody is asked about
        assert judge.pairwise(PROMPTS, COMPLETIONS, reference=[None, "short", None]) == [None, 1.0, None]
        assert judge.pairwise(PROMPTS, COMPLETIONS, first_completion=[None] * 3) == [0.5] * 3
        with pytest.raises(PosttrainError, match="reference"):
            judge.pairwise(PROMPTS, COMPLETIONS)
    with served(lambda body: said("Verdict: A")) as endpoint:
        judge = Judge("m", endpoint.url, cache=tmp_path)
        assert judge.pairwise(PROMPTS, COMPLETIONS, reference=reference) == [0.5] * 3
    with served(lambda body: said("Verdict: neither")) as endpoint:
        judge = Judge("m", endpoint.url, cache=tmp_path)
        assert judge.pairwise(PROMPTS, COMPLETIONS, reference=reference) == [None, None, 0.5]


def test_a_busy_endpoint_is_asked_again_and_a_refusal_is_not(tmp_path: Path) -> None:
    codes = iter((429, 503, 200))
    with served(lambda body: said("Score: 5") if (code := next(codes)) == 200 else (code, {})) as endpoint:
        assert Judge("m", endpoint.url, cache=tmp_path).score(PROMPTS[:1], COMPLETIONS[:1]) == [5.0]
    assert len(endpoint.bodies) == 3
    for code, answer, times in ((500, {}, 2), (401, {"error": "no such key"}, 1), (200, {"no": "choices"}, 1)):
        with served(lambda body, code=code, answer=answer: (code, answer)) as endpoint:  # type: ignore[misc]
            judge = Judge("m", endpoint.url, cache=tmp_path, tries=2, wait=0.01)
            with pytest.raises(PosttrainError) as failed:
                judge.score(PROMPTS[:1], COMPLETIONS[:1])
        assert len(endpoint.bodies) == times
        for words in (endpoint.url, "OPENAI_BASE_URL", "OPENAI_API_KEY", *answer.values()):
            assert words in str(failed.value) or words == "choices", failed.value
    with pytest.raises(PosttrainError, match="cannot be reached"):  # nobody listens there any more
        Judge("m", endpoint.url, cache=tmp_path).score(PROMPTS[:1], COMPLETIONS[:1])


def test_a_judge_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    monkeypatch.delenv("JUDGE_MODEL", raising=False)
    with pytest.raises(ConfigError, match="JUDGE_MODEL"):
        judges.score(PROMPTS, COMPLETIONS)
    with pytest.raises(ConfigError, match="'localhost:8000/v1'"):
        Judge("m", "localhost:8000/v1").score(PROMPTS, COMPLETIONS)
    monkeypatch.setenv("JUDGE_MODEL", "m")
    assert judges.shipped.endpoint() == ("http://127.0.0.1:1/v1/chat/completions", "m")


def test_an_evaluation_is_judged(entry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from architectures import save_architecture

    from posttrain import evaluate

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    monkeypatch.setenv("JUDGE_MODEL", "m")
    policies = [save_architecture(tmp_path / name, name) for name in ("qwen3", "llama3")]
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Say {n}."} for n in range(5)])
    words = (f"policies=[{policies[0]},{policies[1]}]", "data.dataset_name=prompts.jsonl", "max_new_tokens=8")
    words += ("max_length=96", "eval_reward_functions=[posttrain.judges:pairwise]")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    done: Outcome = entry(evaluate.main, *words)
    assert done.code == 2
    assert "OPENAI_BASE_URL" in done.err
    with served(prefers_longer) as endpoint:
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
        done = entry(evaluate.main, *words)
        assert done.code == 0, done
        again = entry(evaluate.main, *words)
        assert again.code == 0, again
    first, second = json.loads(Path("outputs/demo/evaluation-prompts.json").read_text())
    assert first["scores"]["pairwise"] == [0.5] * 5
    lengths = [(len(mine), len(other)) for mine, other in zip(second["answers"], first["answers"], strict=True)]
    wins = [0.5 if mine == other else float(mine > other) for mine, other in lengths]
    assert second["scores"]["pairwise"] == wins
    assert set(wins) != {0.5}
    by = second["against_first"]["pairwise"]
    assert (by["better"], by["worse"]) == (wins.count(1.0), wins.count(0.0))
    assert len(endpoint.bodies) == 2 * sum(a != b for a, b in zip(first["answers"], second["answers"], strict=True))
    assert f"{len(endpoint.bodies)} requests" in done.out
    assert f"{len(endpoint.bodies)} replies from the cache" in again.out


def test_what_is_a_score_and_a_verdict() -> None:
    scores = {"Score: 7": "7", "**score: 8.5/10**": "8.5", "Score: 10.0": "10.0", "so\nScore: 6 out of 10.\n": "6"}
    none = ("Score: -3", "Score: 1 to 10", "Score: 3-4", "Score: 11", "Score: 0", "no")
    assert {text: found[-1] for text in (*scores, *none) if (found := re.findall(A_SCORE, text))} == scores
    verdicts = {"Verdict: A": "A", "verdict: **tie**": "tie", "Verdict: A would be hasty.\nVerdict: B.": "B"}
    assert {text: found[-1] for text in (*verdicts, "Verdict: C") if (found := re.findall(A_VERDICT, text))} == verdicts
