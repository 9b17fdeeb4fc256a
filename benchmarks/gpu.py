"""Every stage on the device at hand: tokens per second, memory against the plan, and a bare TRL script beside it.

    python benchmarks/gpu.py            # a GPU in bf16: GPT-2 of 124 M and a Llama shape of 1.2 B
    python benchmarks/gpu.py --small    # a CPU: a small GPT-2

Each case is a process of its own. posttrain and TRL take turns on the same model, rows and steps; what is compared is
the time inside the Trainer's `train`. The share of the ceiling is 6 × weights × tokens per second (4 × for frozen
weights, whose gradients are not taken; 2 × more for DPO's reference) over the rate of large matrix multiplications
measured in this run. On a CPU the peak holds Python and its libraries as well, which the plan does not.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
LORA = ("model.use_peft=true",)
QLORA = (*LORA, "model.load_in_4bit=true")
# posttrain.run in this process, with a note of time and memory when training ends
WATCH = """
import json, os, resource, sys, time
import torch
from transformers import Trainer
torch.set_num_threads(int(os.environ["THREADS"]))
train = Trainer.train
def watched(self, *arguments, **options):
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    result = train(self, *arguments, **options)
    seconds = time.monotonic() - started
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else rss
    print("NOTE" + json.dumps({"seconds": seconds, "peak": peak}), file=sys.stderr)
    return result
Trainer.train = watched
from posttrain.run import main
main()
"""


@dataclass
class Case:
    """One way to train."""

    name: str
    model: str
    stage: str
    more: tuple[str, ...] = ()
    peer: bool = True  # whether a bare TRL script does the same

    @property
    def run_name(self) -> str:
        """The name with nothing in it that a folder's may not have."""
        return self.name.replace(", ", "-").replace(" ", "-")


def cases(small: bool) -> Iterator[Case]:
    """What is run."""
    for model in ("small",) if small else ("gpt2", "llama-1b"):
        for stage in ("sft", "reward", "dpo"):
            yield Case(f"{model}, {stage}, full", model, stage)
            yield Case(f"{model}, {stage}, LoRA", model, stage, LORA)
        yield Case(f"{model}, ppo, full", model, "ppo", peer=False)
        yield Case(f"{model}, ppo, LoRA", model, "ppo", LORA, peer=False)
        batched = (*LORA, "stage.use_transformers_continuous_batching=true")
        yield Case(f"{model}, ppo, LoRA, continuous batching", model, "ppo", batched, peer=False)
        yield Case(f"{model}, sft, QLoRA", model, "sft", QLORA, peer=False)


def prepare(folder: Path, names: Iterable[str], length: int) -> dict[str, int]:
    """Random models of these shapes, and rows that all have the same length; model -> its weights."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from posttrain.data.template import plain_template

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "posttrain" / "tiny")
    tokenizer.chat_template = plain_template(tokenizer)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    torch.manual_seed(0)
    shapes: dict[str, Any] = {
        "small": lambda: GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=4, n_head=4, vocab_size=8192, **ids)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**ids)),
        "llama-1b": lambda: LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128256,
                hidden_size=2048,
                intermediate_size=8192,
                num_hidden_layers=16,
                num_attention_heads=32,
                num_key_value_heads=8,
                tie_word_embeddings=True,
                max_position_embeddings=2048,
                **ids,
            )
        ),
    }
    weights = {}
    for name in names:
        model = shapes[name]()
        weights[name] = sum(weight.numel() for weight in model.parameters())  # the head is tied to the embeddings
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    words = " ".join(["word"] * (length // 2))
    rows = [{"instruction": f"Say {n:04d}.", "response": f"{n:04d} {words}"} for n in range(512)]
    pairs = [{"prompt": f"Say {n:04d}.", "chosen": f"{n:04d} {words}", "rejected": f"no {words}"} for n in range(512)]
    for file, content in (("sft", rows), ("pairs", pairs), ("prompts", [{"prompt": row["prompt"]} for row in pairs])):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    # a reward with a spread, so that PPO has something to learn from
    (folder / "spread.py").write_text(
        "def spread(prompts, completions, completion_ids, **columns):\n"
        "    return [sum(ids) % 7 / 7 for ids in completion_ids]\n"
    )
    return weights


def ceiling() -> float:
    """Operations per second of large matrix multiplications here, in the precision that is trained in."""
    import torch

    on_gpu = torch.cuda.is_available()
    size, kind = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    left = torch.randn(size, size, dtype=kind, device="cuda" if on_gpu else "cpu")

    def once() -> float:
        started = time.monotonic()
        for _ in range(5):
            left @ left
        if on_gpu:
            torch.cuda.synchronize()
        return 10 * size**3 / (time.monotonic() - started)

    once()
    return max(once() for _ in range(5))


def run(command: list[str], folder: Path) -> dict[str, Any]:
    """The note that a process leaves about its training."""
    path = os.pathsep.join([str(ROOT), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "THREADS": os.environ.get("THREADS", "2")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    lines = [line.rpartition("NOTE")[2] for line in (done.stderr + done.stdout).splitlines()]
    [note] = [json.loads(line) for line in lines if line.startswith('{"seconds"')]
    return note


def posttrain_command(case: Case, folder: Path, sizes: dict[str, int], steps: int) -> list[str]:
    """`posttrain.run` for a case, without evaluations and checkpoints."""
    data = {"sft": "sft", "ppo": "prompts"}.get(case.stage, "pairs")
    ppo = ()
    if case.stage == "ppo":
        ppo = (
            *("stage.reward_functions=[spread.spread]", f"stage.rollout_batch_size={2 * sizes['batch']}"),
            *("stage.num_mini_batches=1", "stage.ppo_epochs=2", f"stage.max_new_tokens={sizes['length'] // 2}"),
        )
    return [
        *(sys.executable, "-c", WATCH, f"stage={case.stage}", f"run_name={case.run_name}"),
        *(f"model.model_name_or_path={folder / case.model}", f"data.dataset_name={folder / data}.jsonl"),
        *(f"stage.batch_size={sizes['batch']}", f"stage.max_length={sizes['length']}", "stage.learning_rate=1e-4"),
        *(f"trainer.max_steps={steps}", "trainer.eval_strategy=no", "trainer.save_strategy=no", "data.test_size=0"),
        *("trainer.logging_steps=10", "stage.warmup_steps=0", "overwrite=true", *ppo, *case.more),
    ]


def planned(case: Case, arguments: list[str], longest: int, completion: int) -> int:
    """The peak that `dry_run=true` tells, in bytes."""
    from posttrain import configure
    from posttrain.models.load import load_tokenizer
    from posttrain.planning.memory import plan_memory

    config = configure(*arguments)
    tokenizer, _ = load_tokenizer(config.model)
    return plan_memory(config, tokenizer, longest, completion if case.stage == "ppo" else 0).peak


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a size for a CPU")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3, help="how often each side runs, in turns")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    given = parser.parse_args()
    import torch

    folder = Path(tempfile.mkdtemp(prefix="gpu-"))
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sizes = {"batch": 4, "length": 128} if given.small else {"batch": 8, "length": 1024}
    wanted = [case for case in cases(given.small) if given.only in case.name]
    weights = prepare(folder, dict.fromkeys(case.model for case in wanted), sizes["length"])
    limit = ceiling()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}: {limit / 1e12:.2f} TFLOP/s in large matrix multiplications")
    print(f"{'':<42} {'tokens/s':>9} {'ceiling':>8} {'peak GiB':>9} {'planned':>8} {'× bare TRL':>11}", flush=True)
    for case in wanted:
        command = posttrain_command(case, folder, sizes, given.steps)
        spec = {
            **sizes,
            "model": str(folder / case.model),
            "stage": case.stage,
            "lora": bool(case.more),
            "rows": str(folder / ("sft.jsonl" if case.stage == "sft" else "pairs.jsonl")),
            "steps": given.steps,
            "output": str(folder / "bare"),
            "threads": int(os.environ.get("THREADS", "2")),
        }
        bare = [sys.executable, str(ROOT / "benchmarks/peers/bare_trl.py"), json.dumps(spec)]
        ours: list[dict[str, Any]] = []
        theirs: list[dict[str, Any]] = []
        for _ in range(given.repeats):
            ours.append(run(command, folder))
            if case.peer:
                theirs.append(run(bare, folder))
        seconds = min(note["seconds"] for note in ours)
        metrics = json.loads((folder / f"outputs/{case.run_name}/{case.stage}/posttrain.json").read_text())
        rate = metrics["metrics"]["tokens_per_second"] if case.stage == "ppo" else None
        sequences = sizes["batch"] * (1 if case.stage == "sft" else 2)
        read = rate or sequences * _row(folder, case, sizes) * given.steps / seconds
        operations = (4 if case.more else 6) + 2 * (case.stage == "dpo")
        share = operations * weights[case.model] * read / limit
        ratio = (
            statistics.median(t["seconds"] / o["seconds"] for o, t in zip(ours, theirs, strict=True))
            if theirs
            else None
        )
        plan = planned(case, command[3:], round(_row(folder, case, sizes)), sizes["length"] // 2) / 2**30
        print(
            f"{case.name:<42} {read:>9,.0f} {'' if case.stage == 'ppo' else f'{share:.1%}':>8} "
            f"{max(note['peak'] for note in ours) / 2**30:>9.2f} {plan:>8.2f} {f'{ratio:.3f}' if ratio else '':>11}",
            flush=True,
        )


def _row(folder: Path, case: Case, sizes: dict[str, int]) -> float:
    """Tokens of one sequence; all rows have the same number, give or take one."""
    from posttrain import configure
    from posttrain.models.load import load_tokenizer
    from posttrain.models.resolve import beside

    tokenizer, _ = load_tokenizer(beside(configure().model, str(folder / case.model)))
    messages = [
        {"role": "user", "content": "Say 0001."},
        {"role": "assistant", "content": "0001" + " word" * (sizes["length"] // 2)},
    ]
    return float(len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)))


if __name__ == "__main__":
    main()
