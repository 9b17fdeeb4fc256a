"""Peak memory of DPO, full and LoRA, against SFT: one machine, one run, a random GPT-2 of 124 million parameters.

    python benchmarks/dpo_memory.py

Each stage runs as a process of its own on the CPU; what is compared is the operating system's account of its
largest resident memory, less that of a process that only imports the libraries.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMON = [
    "+trainer.max_steps=3",
    "stage.max_length=128",
    "stage.batch_size=2",
    "data.test_size=0",
    "model.from_scratch=true",
]
COMMON += ["trainer.eval_strategy=no", "trainer.save_strategy=no"]
RUNS = {
    "SFT, full": ["stage=sft"],
    "DPO, full": ["stage=dpo"],
    "DPO, full, reference precomputed": ["stage=dpo", "+trainer.precompute_ref_log_probs=true"],
    "SFT, LoRA": ["stage=sft", "model.use_peft=true"],
    "DPO, LoRA": ["stage=dpo", "model.use_peft=true"],
}


def peak_of(command: list[str], folder: Path) -> float:
    """Largest resident memory of a command in GiB, measured by a parent that waits for nothing else."""
    watcher = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)\n"
        "sys.stderr.buffer.write(done.stderr if done.returncode else b'')\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
        "sys.exit(done.returncode)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", watcher, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout) / 2**20


def main() -> None:
    from transformers import AutoTokenizer, GPT2Config

    folder = Path(tempfile.mkdtemp(prefix="dpo-memory-"))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "posttrain" / "tiny")
    tokenizer.save_pretrained(folder / "gpt2")
    GPT2Config(bos_token_id=0, eos_token_id=0, pad_token_id=1).save_pretrained(folder / "gpt2")
    words = " ".join(["word"] * 100)
    rows = [{"instruction": f"Say {n}.", "response": f"{n} {words}"} for n in range(12)]
    pairs = [{"prompt": f"Say {n}.", "chosen": f"{n} {words}", "rejected": f"no {words}"} for n in range(12)]
    for name, content in (("sft", rows), ("dpo", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    idle = peak_of([sys.executable, "-c", "import trl.trainer.dpo_trainer, trl.trainer.sft_trainer"], folder)
    print(f"idle, libraries imported: {idle:.2f} GiB; one copy of the weights: {124.4e6 * 4 / 2**30:.2f} GiB")
    peaks = {}
    for number, (name, arguments) in enumerate(RUNS.items()):
        command = [sys.executable, "-m", "posttrain.run", *arguments, *COMMON, f"run_name=run{number}"]
        command += [f"data.dataset_name={folder}/{arguments[0].removeprefix('stage=')}.jsonl"]
        peaks[name] = peak_of([*command, f"model.model_name_or_path={folder / 'gpt2'}"], folder) - idle
    for name, peak in peaks.items():
        print(f"{name:<34} {peak:6.2f} GiB above idle   {peak / peaks['SFT, full']:5.2f} × SFT, full")
    print(f"DPO, LoRA / DPO, full: {peaks['DPO, LoRA'] / peaks['DPO, full']:.2f}")
    (folder / "dpo_memory.json").write_text(json.dumps({"unit": "GiB", "peaks": peaks}))


if __name__ == "__main__":
    main()
