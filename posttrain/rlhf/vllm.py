"""How vLLM is asked for completions through TRL, and what it says of its own tokens."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import torch
from accelerate.utils import broadcast_object_list
from torch.nn.utils.rnn import pad_sequence

from posttrain.errors import PosttrainError

if TYPE_CHECKING:
    from trl import RLOOConfig
    from trl.generation.vllm_generation import VLLMGeneration
    from vllm import RequestOutput, SamplingParams

CONCURRENT = 256  # requests at a time: vLLM's own default for sequences in a batch


class Sampler:
    """TRL's connection to vLLM, told to stop where we do, to draw by our seeds and to give log-probabilities.

    vLLM draws the same random numbers for every prompt of a request that has a seed, so each gets a seed of its own.
    """

    def __init__(self, connection: "VLLMGeneration", stops: Sequence[int]) -> None:
        self.connection, self.seed = connection, 0
        self.logps = torch.empty(0)  # (E, C), of each token of the last completions as vLLM gives it; 0 on padding
        connection.logprobs = 0  # of the sampled token alone
        connection.generation_kwargs = {"stop_token_ids": [*stops], "ignore_eos": True}  # not the folder's own
        self._generate, connection.generate = connection.generate, self.generate
        if connection.mode == "colocate":
            self._ask, connection.llm.generate = connection.llm.generate, self._colocated
        elif connection.accelerator.is_main_process:
            self._ask, connection.vllm_client.generate = connection.vllm_client.generate, self._served

    def generate(self, prompts: list[list[int]], **options: object) -> tuple[object, ...]:
        """As TRL's; the seeds follow from the one that torch's generator was last given on process 0."""
        connection = self.connection
        (self.seed,) = broadcast_object_list([torch.initial_seed()])
        if connection.mode == "colocate":  # processes that share a model ask for each other's prompts as well
            together = connection.tensor_parallel_size
            self.seed += connection.accelerator.process_index // together * together * len(prompts)
        ids, completions, logps, tokens = self._generate(prompts=prompts, **options)
        rows = [torch.tensor([float("nan") if token[0] is None else token[0] for token in row]) for row in logps]
        self.logps = pad_sequence(rows, batch_first=True).to(connection.accelerator.device)
        return ids, completions, logps, tokens

    def _served(
        self, prompts: list[list[int]], generation_kwargs: dict[str, object], **options: object
    ) -> dict[str, list[object]]:
        def ask(index: int) -> dict[str, list[object]]:
            seeded = {**generation_kwargs, "seed": self.seed + index}
            found: dict[str, list[object]] = self._ask([prompts[index]], generation_kwargs=seeded, **options)
            return found

        with ThreadPoolExecutor(CONCURRENT) as threads:
            found = list(threads.map(ask, range(len(prompts))))
        return {name: [row for each in found for row in each[name]] for name in found[0]}

    def _colocated(
        self, prompts: list[object], sampling_params: "SamplingParams", **options: object
    ) -> "list[RequestOutput]":
        each = [sampling_params.clone() for _ in prompts]
        for index, params in enumerate(each):
            params.seed = self.seed + index
        found: list[RequestOutput] = self._ask(prompts, sampling_params=each, **options)
        return found


def server_of(args: "RLOOConfig", model: str) -> str | None:
    """Where the server is expected, and the command that starts one; None without a server."""
    if not args.use_vllm or args.vllm_mode != "server":
        return None
    url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
    return f"{url} (trl vllm-serve --model {model} --port {urlsplit(url).port or 80} starts one)"


@contextmanager
def reaching(server: str | None) -> Iterator[None]:
    """Tell in one line that the server does not answer, or answers with an error.

    Raises:
        PosttrainError: it does.
    """
    try:
        yield
    except Exception as error:  # TRL raises nothing more special
        said = " ".join(str(error).split())[:300]
        if server is None or not (isinstance(error, OSError) or said.startswith(("Request failed", "The vLLM server"))):
            raise
        what = "no answer from" if isinstance(error, OSError) else f"an error ({said}) from"
        raise PosttrainError(f"{what} the vLLM server at {server}; then run the same command again") from error
