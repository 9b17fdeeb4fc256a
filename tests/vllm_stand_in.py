"""What TRL needs of the vllm package, on a CPU: for a server the client's side, and a model in the same process."""

import importlib.machinery
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import requests
from safetensors.torch import save
from torch import Tensor
from trl.generation import vllm_client, vllm_generation
from vllm_server import WEIGHTS, Engine


@dataclass
class SamplingParams:
    n: int
    repetition_penalty: float
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    logprobs: int
    stop_token_ids: list[int]
    ignore_eos: bool
    seed: int | None = None

    def clone(self) -> "SamplingParams":
        return replace(self)


class LLM:
    """vLLM in the process that trains; `asked` keeps the sampling parameters of each prompt."""

    asked: list[SamplingParams] = []  # noqa: RUF012

    def __init__(self, model: str, **options: Any) -> None:
        assert options["logprobs_mode"] == "processed_logprobs"
        self.engine, self.max_model_len = Engine(model), options["max_model_len"]
        runner = types.SimpleNamespace(model=self)
        worker = types.SimpleNamespace(model_runner=runner)
        self.llm_engine = types.SimpleNamespace(model_executor=types.SimpleNamespace(driver_worker=worker))

    def load_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        self.engine.load_weights(dict(weights))

    def reset_prefix_cache(self) -> None: ...

    def generate(self, prompts: list[Any], sampling_params: list[SamplingParams], use_tqdm: bool) -> list[Any]:
        assert len(prompts) == len(sampling_params)
        LLM.asked += sampling_params
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        assert max(map(len, ids)) + sampling_params[0].max_tokens <= self.max_model_len
        found = []
        for prompt, (tokens, logps) in zip(ids, self.engine.complete(ids, asdict(sampling_params[0])), strict=True):
            each = [
                {token: types.SimpleNamespace(logprob=logp, rank=1)} for token, logp in zip(tokens, logps, strict=True)
            ]
            output = types.SimpleNamespace(token_ids=tokens, logprobs=each)
            found.append(types.SimpleNamespace(prompt_token_ids=prompt, outputs=[output]))
        return found


def connect(client: Any, device: object) -> None:
    """As TRL's init_communicator, which needs a GPU for NCCL."""
    assert client.get_server_info()["weight_transfer_config"] is not None
    client.communicator = client.base_url


def close(client: Any) -> None:
    client.communicator = None


def send(iterator: Iterator[tuple[str, Tensor]], group: str, src: int, post_iter_func: Any) -> None:
    """In place of NCCL: the weights in a request."""
    weights = {item[0]: post_iter_func(item).detach().clone().contiguous() for item in iterator}
    requests.post(f"{group}{WEIGHTS}", data=save(weights), timeout=60).raise_for_status()


def install(patch: pytest.MonkeyPatch) -> None:
    """As if vllm had been installed before TRL was imported."""
    package = types.ModuleType("vllm")
    package.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    package.__dict__["__version__"] = "0.30.0"
    patch.setitem(sys.modules, "vllm", package)
    patch.setattr(vllm_client, "_HAS_STATEFUL_TRAINER_ENGINE", True)
    patch.setattr(vllm_client, "_HAS_RESET_PREFIX_CACHE_SUCCESS", True)
    patch.setattr(vllm_client, "packed_nccl_broadcast_producer", send, raising=False)
    patch.setattr(vllm_client.VLLMClient, "init_communicator", connect)
    patch.setattr(vllm_client.VLLMClient, "close_communicator", close)
    patch.setattr(vllm_generation, "LLM", LLM, raising=False)
    patch.setattr(vllm_generation, "SamplingParams", SamplingParams, raising=False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # TRL sets them for vLLM
        if name not in os.environ:
            patch.setenv(name, "")
            patch.delenv(name)


def main() -> None:
    """`posttrain run` with it, for processes of accelerate."""
    from posttrain.run import main

    install(pytest.MonkeyPatch())
    main()


if __name__ == "__main__":
    main()
