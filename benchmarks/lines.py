"""Lines that a user writes for SFT, reward model, RLHF and DPO: counted in files that this script runs, two steps each.

    python benchmarks/lines.py [folder]

posttrain and TRL run in this environment, the others in ones that the script makes in the folder. TRL has no PPO
since 1.13: its RLOO stands in for it. No peer's files judge the reward model or compare the policies.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from peers import environment

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = ROOT / "benchmarks" / "peers" / "four_stages"
FACTORY = ["torch==2.13.0", "llamafactory==0.9.5"]
SWIFT = ["torch==2.13.0", "ms-swift==4.6.0"]
SOUP = ["torch==2.13.0", "soup-cli[train]==0.77.0"]


def factory_environment(folder: Path) -> Path:
    """LLaMA-Factory's programs; without the vision and audio code, which beside a torch for CPUs cannot be loaded."""
    programs = environment(folder / "llamafactory-0.9.5", *FACTORY)
    subprocess.run([str(programs / "pip"), "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    for library in programs.parent.glob("lib/python*/site-packages/torchaudio/lib/*.so"):
        library.unlink()
    return programs


def prepare(folder: Path) -> None:
    """A random model with a chat template, and rows for each stage.

    The head has weights of its own: LLaMA-Factory 0.9.5 cannot save a reward model of one that shares them.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from posttrain.data.template import plain_template

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "posttrain" / "tiny")
    tokenizer.chat_template = plain_template(tokenizer)
    tokenizer.save_pretrained(folder / "model")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = LlamaConfig(**shape, **ids, vocab_size=916, max_position_embeddings=512, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    numbers = range(60)
    rows = [{"instruction": f"Say {n}.", "response": f"{n} it is."} for n in numbers]
    pairs = [{"prompt": f"Say {n}.", "chosen": f"{n} it is.", "rejected": "No."} for n in numbers]
    prompts = [{"prompt": f"Say {n}."} for n in numbers]
    alpaca = [{"instruction": row["instruction"], "input": "", "output": row["response"]} for row in rows]
    asked = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in prompts]
    files = {"rows": rows, "alpaca": alpaca, "pairs": pairs, "prompts": prompts, "asked": asked}
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def written(name: str) -> list[Path]:
    """The files of one side."""
    return [WRITTEN / f"{name}.sh", *sorted(path for path in (WRITTEN / name).rglob("*") if path.is_file())]


def run(name: str, folder: Path, programs: Path) -> None:
    """Run a side's commands in the folder, on the CPU."""
    for path in written(name):
        target = folder / path.relative_to(WRITTEN)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    if name == "llamafactory":
        shutil.copy(WRITTEN / name / "dataset_info.json", folder)
    places = f"{programs}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": places, "PYTHONPATH": str(ROOT) if name in ("posttrain", "trl") else ""}
    offline = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        ["bash", "-e", f"{name}.sh"],
        cwd=folder,
        env={**variables, **offline},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="lines-")).resolve()
    folder.mkdir(exist_ok=True)
    prepare(folder)
    here = Path(sys.executable).parent
    sides = {
        "posttrain": here,
        "trl": here,
        "llamafactory": factory_environment(folder),
        "swift": environment(folder / "ms-swift-4.6.0", *SWIFT),
        "soup": environment(folder / "soup-cli-0.77.0", *SOUP),
    }
    for name, programs in sides.items():
        run(name, folder, programs)
        lines = sum(bool(line.strip()) for path in written(name) for line in path.read_text().splitlines())
        files = len(written(name))
        print(f"{name:<13} {lines:4} lines in {files} {'file' if files == 1 else 'files'}", flush=True)


if __name__ == "__main__":
    main()
