"""Peak memory of every stage, measured and as `dry_run=true` plans it: a random GPT-2 of 124 million parameters.

    python benchmarks/memory.py

Each stage runs as a process of its own on the CPU; what is measured is the operating system's account of its largest
resident memory, less that of a process that imports the libraries and trains next to nothing.
"""

import json
import os
import tempfile
from pathlib import Path

from cost import ROOT, cost_of

COMMON = [
    "stage.max_length=128",
    "stage.batch_size=2",
    "data.test_size=0",
    "trainer.eval_strategy=no",
    "trainer.save_strategy=no",
    "+trainer.max_steps=3",
]
PPO = ["stage=ppo", "stage.max_new_tokens=100", "stage.rollout_batch_size=4", "stage.num_mini_batches=1"]
RUNS = {
    "SFT, full": ["stage=sft"],
    "SFT, full, recomputing": ["stage=sft", "trainer.gradient_checkpointing=true"],
    "SFT, LoRA": ["stage=sft", "model.use_peft=true"],
    "reward, full": ["stage=reward"],
    "reward, LoRA": ["stage=reward", "model.use_peft=true"],
    "DPO, full": ["stage=dpo"],
    "DPO, full, reference precomputed": ["stage=dpo", "+trainer.precompute_ref_log_probs=true"],
    "DPO, LoRA": ["stage=dpo", "model.use_peft=true"],
    "PPO, full": [*PPO, "stage.reward_model=outputs/reward-full/reward"],
    "PPO, LoRA": [*PPO, "model.use_peft=true", "stage.reward_model=outputs/reward-lora/reward"],
}


def command_of(name: str, folder: Path, model: str) -> list[str]:
    """The run's command line, after `python -m posttrain.run`."""
    arguments = RUNS[name]
    rows = {"sft": "rows", "reward": "pairs", "dpo": "pairs", "ppo": "prompts"}[arguments[0].removeprefix("stage=")]
    gate = ["stage.gate=warn"] if rows == "prompts" else []
    run_name = name.lower().replace(", ", "-").replace(" ", "-")
    data = f"data.dataset_name={folder}/{rows}.jsonl"
    return [*arguments, *gate, *COMMON, f"run_name={run_name}", data, f"model.model_name_or_path={folder / model}"]


def peak_of(command: list[str], folder: Path) -> float:
    """Largest resident memory of `posttrain run` in GiB, with freed blocks of 64 KiB and more given back at once."""
    return cost_of(["-m", "posttrain.run", *command], folder, MALLOC_MMAP_THRESHOLD_="65536").peak / 2**30


def planned(arguments: list[str]) -> float:
    """What the dry run says, in GiB."""
    from posttrain import configure
    from posttrain.models.load import load_tokenizer
    from posttrain.planning.memory import plan_memory

    config = configure(*arguments)
    tokenizer, _ = load_tokenizer(config.model)
    return plan_memory(config, tokenizer, longest=128, completion=100).peak / 2**30


def main() -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = Path(tempfile.mkdtemp(prefix="memory-"))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "posttrain" / "tiny")
    for name, shape in (("gpt2", {}), ("nothing", {"n_embd": 8, "n_head": 1, "n_layer": 1, "vocab_size": 1000})):
        config = GPT2Config(**shape, bos_token_id=0, eos_token_id=0, pad_token_id=1)
        GPT2LMHeadModel(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    words = " ".join(["word"] * 100)
    rows = [{"instruction": f"Say {n}.", "response": f"{n} {words}"} for n in range(12)]
    pairs = [{"prompt": f"Say {n}.", "chosen": f"{n} {words}", "rejected": f"no {words}"} for n in range(12)]
    prompts = [{"prompt": f"Say {n}."} for n in range(12)]
    for name, content in (("rows", rows), ("pairs", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    os.chdir(folder)
    idle = peak_of([*command_of("SFT, full", folder, "nothing"), "run_name=idle"], folder)
    print(f"idle: {idle:.2f} GiB; one copy of the weights: {124.4e6 * 4 / 2**30:.2f} GiB\n")
    print(f"{'GiB above idle':<34} measured planned   error   × SFT, full", flush=True)
    peaks: dict[str, float] = {}
    for name in RUNS:
        command = command_of(name, folder, "gpt2")
        peaks[name] = peak_of(command, folder) - idle
        plan = planned(command)
        error = plan / peaks[name] - 1
        ratio = peaks[name] / peaks["SFT, full"]
        print(f"{name:<34} {peaks[name]:8.2f} {plan:7.2f} {error:+7.1%} {ratio:13.2f}", flush=True)
    print(f"\nDPO, LoRA / DPO, full: {peaks['DPO, LoRA'] / peaks['DPO, full']:.2f}")
    print(f"PPO, LoRA / PPO, full: {peaks['PPO, LoRA'] / peaks['PPO, full']:.2f}")


if __name__ == "__main__":
    main()
