"""What it costs to prepare the data, beside a bare TRL script on the same rows, and what evaluation takes of a run.

    python benchmarks/data.py [--rows 1000 10000 100000] [--stages sft dpo] [--tokenizers byte spaced]

What is measured of posttrain is `posttrain data prepare`, and of TRL a trainer until it could take its first step. CPU
seconds and the largest resident memory are the operating system's account of the child processes.
"""

import argparse
import json
import math
import random
import shutil
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from cost import ROOT, Cost, cost_of

TWO = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / "cpu2.yaml")]
TWO += ["--main_process_port", "0"]
HELD_OUT = 0.05
# what the numbers should be
FIRST, SECOND, BYTES_A_ROW, EVALUATION = 0.6, 1.0, 50, 0.05


def _cost(arguments: Sequence[str], folder: Path) -> Cost:
    return cost_of(arguments, folder, HF_DATASETS_CACHE=str(folder / "cache"), HF_HUB_OFFLINE="1")


def write_model(kind: str, texts: Sequence[str], folder: Path) -> Path:
    """The embedded model's shape with a tokenizer of 8,000 tokens: byte-level BPE, or one that begins with a space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "byte":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "byte" else []
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    model = folder / kind
    fast.save_pretrained(model)
    config = AutoConfig.from_pretrained(ROOT / "posttrain" / "tiny")
    config.update(
        {"vocab_size": len(fast), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "n_positions": 1024}
    )
    config.save_pretrained(model)
    return model


def write_rows(stage: str, count: int, folder: Path) -> Path:
    """Rows of made-up words, about 330 tokens each, no two alike."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucmfw", k=draw.randint(2, 9))) for _ in range(5000)]

    def text(middle: int) -> str:
        return " ".join(draw.choices(words, k=min(int(math.exp(draw.gauss(math.log(middle), 0.5))) + 1, 400)))

    file = folder / f"{stage}-{count}.jsonl"
    with file.open("w") as lines:
        for number in range(count):
            asked = f"{number} {text(30)}"
            row = (
                {"instruction": asked, "response": text(120)}
                if stage == "sft"
                else {"prompt": asked, "chosen": text(60), "rejected": text(60)}
            )
            lines.write(json.dumps(row) + "\n")
    return file


def _overrides(stage: str, rows: Path, model: Path) -> list[str]:
    start = [f"model.model_name_or_path={model}", "model.from_scratch=true", "stage.max_length=1024"]
    return [f"stage={stage}", f"data.dataset_name={rows}", f"data.test_size={HELD_OUT}", *start]


def compare(stage: str, kind: str, counts: Sequence[int]) -> None:
    """First and second start, one process and two, at each number of rows."""
    peaks: dict[int, float] = {}
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="data-") as name:
            folder = Path(name)
            rows = write_rows(stage, count, folder)
            with rows.open() as lines:
                model = write_model(kind, [line for _, line in zip(range(2000), lines, strict=False)], folder)
            bare = [
                str(ROOT / "benchmarks" / "peers" / "bare_data.py"),
                stage,
                str(rows),
                str(model),
                str(folder / "o"),
            ]
            ours = ["-m", "posttrain", "data", "prepare", *_overrides(stage, rows, model)]
            title = f"{stage}, {kind}, {count:,} rows"
            # two processes last, from a cache of their own where there is one
            for what, launch, aim in (
                ("first start", [], FIRST),
                ("second start", [], SECOND),
                ("two ranks", TWO, FIRST),
            ):
                if launch:
                    for made in ("cache", "outputs"):
                        shutil.rmtree(folder / made, ignore_errors=True)
                mine, theirs = _cost([*launch, *ours], folder), _cost([*launch, *bare], folder)
                print(
                    f"{title:<28} {what:<12} {mine.seconds:8.1f} s {theirs.seconds:8.1f} s "
                    f"{mine.seconds / theirs.seconds:6.2f} (aim {aim:.2f})  {mine.peak / 2**20:8,.0f} MiB "
                    f"{theirs.peak / 2**20:8,.0f} MiB",
                    flush=True,
                )
                if what == "second start":
                    peaks[count] = mine.peak
    for fewer, more in pairwise(sorted(peaks)):
        growth = (peaks[more] - peaks[fewer]) / (more - fewer)
        print(f"{stage}, {kind}: {growth:,.0f} bytes a row from {fewer:,} to {more:,} rows (aim {BYTES_A_ROW})")


def evaluation(count: int) -> None:
    """The share of a run that evaluation takes: with it and without, on one process and on two; on eight by count."""
    with tempfile.TemporaryDirectory(prefix="data-") as name:
        folder = Path(name)
        rows = write_rows("sft", count, folder)
        model = write_model("byte", rows.read_text().splitlines()[:2000], folder)
        run = ["-m", "posttrain.run", *_overrides("sft", rows, model), "stage.num_epochs=1", "overwrite=true"]
        idle = [*run, "+trainer.max_steps=1", "trainer.eval_strategy=no"]
        for processes, launch in ((1, []), (2, TWO)):
            start = _cost([*launch, *idle], folder).seconds
            without = _cost([*launch, *run, "trainer.eval_strategy=no"], folder).seconds - start
            whole = _cost([*launch, *run], folder).seconds - start
            share = max(whole - without, 0) / whole
            print(f"evaluation, {processes} process(es): {share:.1%} of the run's CPU time (aim {EVALUATION:.0%})")
    # a forward pass costs a third of a training step; five evaluations, each process a share of the held-out rows
    held_out, trained = 5 * math.ceil(count * HELD_OUT / 8) / 3, math.ceil(count * (1 - HELD_OUT) / 8)
    print(f"evaluation, 8 processes, by count: {held_out / (held_out + trained):.1%} (aim {EVALUATION:.0%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="1000000 takes an hour")
    parser.add_argument("--stages", nargs="+", choices=("sft", "dpo"), default=["sft", "dpo"])
    parser.add_argument("--tokenizers", nargs="+", choices=("byte", "spaced"), default=["byte", "spaced"])
    parser.add_argument("--evaluation-rows", type=int, default=400, help="0: leave the evaluation out")
    asked = parser.parse_args()
    print(f"{'':<41} {'posttrain':>10} {'bare TRL':>10}  ratio of CPU time   largest process")
    for stage in asked.stages:
        for kind in asked.tokenizers:
            compare(stage, kind, asked.rows)
    if asked.evaluation_rows:
        evaluation(asked.evaluation_rows)


if __name__ == "__main__":
    main()
