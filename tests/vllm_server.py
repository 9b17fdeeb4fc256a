"""A server with vLLM's HTTP protocol, as TRL's client speaks it, that generates with transformers on a CPU."""

import argparse
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor
from transformers import AutoModelForCausalLM

WEIGHTS = "/weights"  # where the stand-in for NCCL sends them


class Engine:
    """A model that completes prompts by vLLM's sampling parameters: a batch is seeded by its first prompt's seed."""

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.weights = dict(self.model.named_parameters())

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        assert weights.keys() <= self.weights.keys(), weights.keys() - self.weights.keys()
        with torch.no_grad():
            for name, weight in weights.items():
                self.weights[name].copy_(weight)

    @torch.no_grad()
    def complete(self, prompts: list[list[int]], options: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
        """Tokens and their log-probabilities at the temperature, as --logprobs-mode processed_logprobs has them."""
        assert (options["top_k"], options["top_p"], options["min_p"], options["repetition_penalty"]) == (0, 1, 0, 1)
        assert options["n"] == 1
        assert options["logprobs"] == 0
        stops = set(options["stop_token_ids"])
        if not options["ignore_eos"]:
            own = self.model.generation_config.eos_token_id
            stops |= {own} if isinstance(own, int) else {*own}
        width = max(map(len, prompts))
        padded = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
        with torch.random.fork_rng([]):
            torch.manual_seed(options["seed"])
            found = self.model.generate(
                input_ids=padded,
                attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts]),
                do_sample=True,
                temperature=options["temperature"],
                top_k=0,
                top_p=1.0,
                max_new_tokens=options["max_tokens"],
                eos_token_id=[*stops],
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
            )
        logps = torch.stack([score.log_softmax(-1) for score in found.scores], dim=1)
        completions = []
        for tokens, each in zip(found.sequences[:, width:].tolist(), logps, strict=True):
            length = next((place for place, token in enumerate(tokens, 1) if token in stops), len(tokens))
            completions.append((tokens[:length], each[range(length), tokens[:length]].tolist()))
        return completions

    @torch.no_grad()
    def invent(self, prompt: list[int], length: int) -> tuple[list[int], list[float]]:
        """Random tokens, and their true log-probabilities."""
        tokens = torch.randint(2, self.model.config.vocab_size, (length,)).tolist()
        logps = self.model(torch.tensor([prompt + tokens])).logits[0, -length - 1 : -1].log_softmax(-1)
        return tokens, logps[range(length), tokens].tolist()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def reply(self, content: object, code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        config = {"weight_transfer_config": {"backend": "nccl"}}
        answers = {
            "/health": {},
            "/v1/models": {"data": [{"id": "model"}]},
            "/server_info": {"vllm_config": config},
            "/get_world_size": {"world_size": 1},
        }
        self.reply(answers[self.path.split("?")[0]])

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == WEIGHTS:
            with self.server.lock:
                if not self.server.options.deaf:
                    self.server.engine.load_weights(load(body))
            self.reply({})
        elif self.path == "/v1/completions":
            self.reply({"choices": [self.server.complete(json.loads(body))]})
        else:
            self.reply({"success": True})


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(("127.0.0.1", options.port), Handler)
        self.options, self.engine = options, Engine(options.model)
        self.lock = threading.Condition()
        self.waiting: list[dict[str, Any]] = []
        self.asked = 0

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """Wait until --together requests are there, and complete them in one batch, as vLLM would."""
        with self.lock:
            with Path(self.options.folder, "requests.jsonl").open("a") as lines:
                lines.write(json.dumps(request) + "\n")
            self.asked += 1
            if self.asked == self.options.dies_at:
                os._exit(1)
            self.waiting.append(request)
            if len(self.waiting) == self.options.together:
                batch = sorted(self.waiting, key=lambda each: each["seed"])
                self.waiting = []
                if self.options.random:
                    done = [self.engine.invent(each["prompt"][0], each["max_tokens"]) for each in batch]
                else:
                    done = self.engine.complete([each["prompt"][0] for each in batch], batch[0])
                for each, (tokens, logps) in zip(batch, done, strict=True):
                    each["done"] = (tokens, logps)
                self.lock.notify_all()
            self.lock.wait_for(lambda: "done" in request)
        tokens, logps = request["done"]
        names = [f"token_id:{token}" for token in tokens]
        said = {"tokens": names, "token_logprobs": logps, "top_logprobs": [None] * len(names)}
        return {"prompt_token_ids": request["prompt"][0], "token_ids": tokens, "logprobs": said}


def main() -> None:
    """`vllm_server MODEL FOLDER`: its port is written to FOLDER/port, what it is asked to FOLDER/requests.jsonl."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--together", type=int, default=1)
    parser.add_argument("--deaf", action="store_true", help="keep the weights that it began with")
    parser.add_argument("--random", action="store_true", help="answer random tokens")
    parser.add_argument("--dies-at", type=int, help="end at this request for a completion")
    server = Server(parser.parse_args())
    Path(server.options.folder, "port.part").write_text(str(server.server_address[1]))
    Path(server.options.folder, "port.part").rename(Path(server.options.folder, "port"))
    server.serve_forever()
