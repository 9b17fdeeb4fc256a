"""How vLLM is asked for completions through TRL, and what it says of its own tokens."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from posttrain.console import say
from posttrain.errors import PosttrainError
from posttrain.values import JsonObject

if TYPE_CHECKING:
    from trl import RLOOConfig
    from trl.generation.vllm_generation import VLLMGeneration

CONCURRENT = 64  # requests at a time: TRL's client keeps as many connections


class Sampler:
    """TRL's connection to vLLM, told to stop where we do, to draw by our seeds and to give log-probabilities."""

    def __init__(self, connection: "VLLMGeneration", stops: Sequence[int]) -> None:
        self.connection = connection
        self.logps: list[list[float]] = []  # of each token of the last completions, under what vLLM sampled from
        connection.logprobs = 0  # of the sampled token alone
        connection.generation_kwargs = {"stop_token_ids": [*stops], "ignore_eos": True}  # not the folder's own
        self._generate, connection.generate = connection.generate, self.generate
        if connection.mode == "colocate":
            connection.llm.generate = partial(_colocated, connection.llm.generate)
        elif connection.accelerator.is_main_process:
            connection.vllm_client.generate = partial(_served, connection.vllm_client.generate)

    def generate(self, prompts: list[list[int]], **options: object) -> tuple[object, ...]:
        """As TRL's; the seeds follow from the one that torch's generator was last given on process 0."""
        connection = self.connection
        (seed,) = broadcast_object_list([torch.initial_seed()])
        if connection.mode == "colocate":  # processes that share a model ask for each other's prompts as well
            together = connection.tensor_parallel_size
            seed += connection.accelerator.process_index // together * together * len(prompts)
        connection.generation_kwargs["seed"] = seed
        found: tuple[Any, ...] = self._generate(prompts=prompts, **options)
        self.logps = [[float("nan") if token[0] is None else token[0] for token in row] for row in found[2]]
        return found

    def logps_on(self, device: torch.device) -> Tensor:
        """`logps` as (E, C), 0 on padding."""
        return pad_sequence([torch.tensor(row) for row in self.logps], batch_first=True).to(device)


# vLLM draws the same random numbers for every prompt of a request that has a seed: each gets a seed of its own


def _served(
    generate: Callable[..., JsonObject], prompts: list[list[int]], generation_kwargs: JsonObject, **options: object
) -> JsonObject:
    def ask(index: int) -> JsonObject:
        seeded = {**generation_kwargs, "seed": generation_kwargs["seed"] + index}
        return generate(prompts=[prompts[index]], generation_kwargs=seeded, **options)

    with ThreadPoolExecutor(CONCURRENT) as threads:
        found = list(threads.map(ask, range(len(prompts))))
    return {name: [row for each in found for row in each[name]] for name in found[0]}


def _colocated(generate: Callable[..., Any], prompts: list[Any], sampling_params: Any, **options: object) -> Any:
    each = [sampling_params.clone() for _ in prompts]
    for index, params in enumerate(each):
        params.seed += index
    return generate(prompts, sampling_params=each, **options)


def announce(args: "RLOOConfig", model: str) -> None:
    """Print where a server is expected, before TRL waits for it."""
    if args.use_vllm and args.vllm_mode == "server":
        url, command = _server(args, model)
        say(f"vLLM: waiting up to {args.vllm_server_timeout:g} s for the server at {url} (started by: {command})")


@contextmanager
def reaching_server(args: "RLOOConfig", model: str) -> Iterator[None]:
    """Name the server and the command that starts one where it does not answer, or answers with an error.

    Raises:
        PosttrainError: it does.
    """
    try:
        yield
    except Exception as error:
        of_server = isinstance(error, OSError) or str(error).startswith(("Request failed", "The vLLM server"))
        if not (args.use_vllm and args.vllm_mode == "server" and of_server):
            raise
        url, command = _server(args, model)
        said = "gives no answer" if isinstance(error, OSError) else f"fails ({' '.join(str(error).split())[:300]})"
        raise PosttrainError(
            f"the vLLM server at {url} {said}. Start one and run the same command again: {command}"
        ) from error


def _server(args: "RLOOConfig", model: str) -> tuple[str, str]:
    url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
    return url, f"trl vllm-serve --model {model} --port {urlsplit(url).port or 80}"
