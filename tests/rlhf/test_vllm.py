"""PPO that generates with vLLM through TRL, as a server and in the same process: what it is asked, checked and told.

Both generate with transformers here (tests/vllm_server.py), so that the results can be compared with plain generation.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import vllm_stand_in
from conftest import (
    LORA,
    REWARD,
    SHORT_PPO,
    TIMES,
    Posttrain,
    computed,
    ended,
    launched,
    logged,
    read_rows,
    same_weights,
    start,
    wait_for,
    weights,
)
from filelock import FileLock
from forked import Forked

from posttrain import paths

TESTS = Path(vllm_stand_in.__file__).parent
PPO = ("stage=ppo", *SHORT_PPO, REWARD, "model.model_name_or_path=./policy", "stage.vf_coef=0.5")
VLLM = ("stage.use_vllm=true", "+trainer.vllm_server_host=127.0.0.1", "+trainer.vllm_server_timeout=0")
OURS = {"vllm_difference", "vllm_difference_max", "vllm_tokens_beyond"}


class Served:
    """A running server."""

    def __init__(self, process: Forked, folder: Path) -> None:
        self.process, self.folder = process, folder
        self.port = int((folder / "port").read_text())
        self.asks = ("+trainer.vllm_mode=server", *VLLM, f"+trainer.vllm_server_port={self.port}")

    def requests(self) -> list[dict[str, Any]]:
        return read_rows(self.folder / "requests.jsonl")


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Served]]:
    """Start servers of ./policy, a model whose next tokens are not all alike; TRL finds vllm installed."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(paths.TINY))
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(8)
    model.save_pretrained(tmp_path / "policy")
    AutoTokenizer.from_pretrained(paths.TINY).save_pretrained(tmp_path / "policy")
    vllm_stand_in.install(monkeypatch)
    processes = []

    def serve(*options: str, model: str = "policy") -> Served:
        folder = tmp_path / f"server-{len(processes)}"
        folder.mkdir()
        process = start(str(tmp_path / model), str(folder), *options, cwd=tmp_path, module="vllm_server")
        processes.append(process)
        wait_for(folder / "port", process)
        return Served(process, folder)

    yield serve
    for process in processes:
        process.kill()


def rollouts(run: str) -> list[dict[str, Any]]:
    return [line for line in logged(Path("outputs", run, "ppo")) if "reward_std" in line]


def without_vllm(run: str) -> list[dict[str, Any]]:
    lines = computed(f"outputs/{run}/ppo")
    return [{name: value for name, value in line.items() if name not in OURS} for line in lines]


def test_a_server_seeded_alike_gives_what_plain_generation_gives(
    posttrain: Posttrain, prompts: str, serve: Callable[..., Served]
) -> None:
    """Eight prompts in a rollout and in the step-0 check, each in a request with a seed of its own."""
    plain = posttrain(*PPO, prompts, "run_name=plain")
    assert plain.code == 0, plain
    server = serve("--together", "8")
    done = posttrain(*PPO, prompts, *server.asks, "run_name=vllm")
    assert done.code == 0, done
    assert f"{server.port} (trl vllm-serve --model ./policy --port {server.port} starts one)" in done.out
    assert "vLLM's log-probabilities within" in done.out
    assert same_weights(Path("outputs/plain/ppo/model"), Path("outputs/vllm/ppo/model"))
    assert without_vllm("plain") == without_vllm("vllm")
    assert len(rollouts("vllm")) == 4
    assert all(line["vllm_difference_max"] < 1e-4 for line in rollouts("vllm"))
    assert all(line["vllm_tokens_beyond"] == 0 for line in rollouts("vllm"))
    asked = server.requests()
    assert len({each["seed"] for each in asked}) == len(asked) == 8 + 4 * 8
    assert all(each["ignore_eos"] and each["stop_token_ids"] for each in asked)


@pytest.mark.slow
def test_adapters_are_merged_into_what_the_server_is_sent(
    posttrain: Posttrain, prompts: str, serve: Callable[..., Served]
) -> None:
    """Merging and unmerging rounds the base's weights, so the results are equal to float32's rounding."""
    for name, more in (("plain", ()), ("vllm", serve("--together", "8").asks)):
        done = posttrain(*PPO, prompts, *LORA, *more, f"run_name={name}")
        assert done.code == 0, done
    assert all(line["vllm_difference_max"] < 1e-4 for line in rollouts("vllm"))
    for one, other in zip(rollouts("plain"), rollouts("vllm"), strict=True):
        assert {name: other[name] for name in one.keys() - TIMES} == pytest.approx(
            {name: one[name] for name in one.keys() - TIMES}, rel=1e-3, abs=1e-4
        )
    first, second = (weights(Path(f"outputs/{name}/ppo/model")) for name in ("plain", "vllm"))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-4


@pytest.mark.slow
def test_a_model_in_the_same_process_gives_what_plain_generation_gives(
    posttrain: Posttrain, prompts: str, serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_stand_in.LLM, "asked", [])
    for name, more in (("plain", ()), ("vllm", ("stage.use_vllm=true",))):
        done = posttrain(*PPO, prompts, *more, f"run_name={name}")
        assert done.code == 0, done
    assert same_weights(Path("outputs/plain/ppo/model"), Path("outputs/vllm/ppo/model"))
    assert without_vllm("plain") == without_vllm("vllm")
    asked = vllm_stand_in.LLM.asked
    assert len({each.seed for each in asked}) == len(asked) == 8 + 4 * 8


@pytest.mark.slow
def test_two_processes_resume_to_the_same_bits(prompts: str, serve: Callable[..., Served], tmp_path: Path) -> None:
    lines = ("import sys", f"sys.path.insert(0, {str(TESTS)!r})", "from vllm_stand_in import main", "main()")
    (tmp_path / "with_vllm.py").write_text("\n".join(lines))
    server = serve()
    run = (*PPO, prompts, *server.asks, "stage.batch_size=2", "trainer.save_strategy=steps", "trainer.save_steps=1")
    cut = launched(*run, "run_name=cut", cwd=tmp_path, module="with_vllm")
    wait_for(tmp_path / "outputs/cut/ppo/checkpoint-5/checkpoint.json", cut)
    for process in psutil.Process(cut.pid).children(recursive=True):  # sessions of their own
        process.kill()
    cut.communicate()
    with FileLock(tmp_path / "outputs/cut/.ppo.lock", timeout=60):
        pass  # the launcher's children end a moment later
    for name in ("cut", "whole"):
        done = ended(launched(*run, f"run_name={name}", cwd=tmp_path, module="with_vllm"))
        assert done.code == 0, done
        assert ("resuming from checkpoint-" in done.out) == (name == "cut")
    first, second = (tmp_path / "outputs" / name / "ppo" for name in ("cut", "whole"))
    assert same_weights(first / "model", second / "model")
    assert computed(first) == computed(second)
    assert all(line["vllm_difference_max"] < 1e-4 for line in rollouts(str(tmp_path / "outputs/whole")))
    whole = server.requests()[-(2 * 8 + 4 * 8) :]
    assert len({each["seed"] for each in whole}) == len(whole)


WRONG = {
    "random tokens": (("--random",), "nats less likely than the policy's own. Cause: vLLM samples from another"),
    "other weights": (("--deaf", "other"), "it holds other weights (were they sent?)"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("options", "told"), WRONG.values(), ids=WRONG)
def test_a_server_that_samples_from_another_model_is_refused_at_step_0(
    posttrain: Posttrain, prompts: str, serve: Callable[..., Served], options: tuple[str, ...], told: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("policy"))
    other.save_pretrained("other")
    done = posttrain(*PPO, prompts, *serve(*options[:1], model=[*options, "policy"][1]).asks)
    assert done.code == 1, done
    assert "step-0 check failed" in done.err
    assert told in done.err
    assert not Path("outputs/demo/ppo/posttrain.json").exists()


@pytest.mark.slow
def test_a_server_that_is_not_there_or_dies_is_told_with_the_command_that_starts_one(
    posttrain: Posttrain, prompts: str, serve: Callable[..., Served]
) -> None:
    run = (*PPO, prompts, "trainer.save_strategy=steps", "trainer.save_steps=1")
    dying = serve("--together", "8", "--dies-at", "20")  # in the second rollout
    for _ in range(2):  # TRL asks again for a minute; the second time there is none from the start
        done = posttrain(*run, *dying.asks)
        assert done.code == 1, done
        [told] = done.err.splitlines()
        assert told == (
            f"PosttrainError: no answer from the vLLM server at http://127.0.0.1:{dying.port} (trl vllm-serve --model "
            f"./policy --port {dying.port} starts one); then run the same command again"
        )
    again = serve("--together", "8", "--port", str(dying.port))
    for name, more in (("demo", again.asks), ("plain", ())):
        done = posttrain(*run, *more, f"run_name={name}")
        assert done.code == 0, done
    assert same_weights(Path("outputs/demo/ppo/model"), Path("outputs/plain/ppo/model"))


@pytest.mark.slow
def test_what_vllm_samples_from_is_watched_and_corrected_for(
    posttrain: Posttrain, prompts: str, serve: Callable[..., Served]
) -> None:
    """A server that never takes new weights is right at step 0, and off by as much as the policy has moved later."""
    runs = {"none": (), "halved": ("stage.vllm_importance_sampling_cap=0.5",)}
    first = {}
    for name, more in runs.items():
        done = posttrain(*PPO, prompts, *serve("--together", "8", "--deaf").asks, *more, f"run_name={name}")
        assert done.code == 0, done
        assert "vLLM's log-probabilities are" in done.out
        assert ("stage.vllm_importance_sampling_cap=2 corrects for it" in done.out) == (name == "none")
        assert rollouts(name)[0]["vllm_difference_max"] < 1e-4 < 0.1 < rollouts(name)[-1]["vllm_difference_max"]
        assert rollouts(name)[-1]["vllm_tokens_beyond"] > 0
        first[name] = next(line["policy_loss"] for line in logged(f"outputs/{name}/ppo") if "policy_loss" in line)
    assert first["halved"] == pytest.approx(first["none"] / 2, rel=1e-3)  # π / π_vLLM is 1 there, and cut to 0.5
    done = posttrain(*PPO, prompts, "stage.vllm_importance_sampling_cap=2", "run_name=without")
    assert done.code == 2, done
    assert "stage.vllm_importance_sampling_cap is read by stage.use_vllm=true only" in done.err
