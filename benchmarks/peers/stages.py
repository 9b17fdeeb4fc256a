"""The four stages with each tool: time to a typo and to the first step, speed, memory, resume, a second start."""

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peers import inputs, watch
from peers.inputs import Job
from peers.tools import TOOLS, Tool

ROWS, STEPS = 160, 40  # four rows to a step
HALF = STEPS // 2
ROWS_OF = {"sft": "rows.jsonl", "reward": "pairs.jsonl", "dpo": "pairs.jsonl", "ppo": "prompts.jsonl"}
KEYS = ("first step", "steps/s", "CPU s", "peak MiB", "killed and continued", "started again at another rate")

TYPO = ("seconds", "CPU s", "exit", "said")


def prepare(folder: Path) -> None:
    """The unbroken inputs, with a model of 3 million weights."""
    inputs.prepare(folder)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    inputs.save_model(folder / "model", inputs.template(), **shape)
    inputs.save_scorer(folder)
    inputs.write(folder / "rows.jsonl", [inputs.row(f"Say {n}.", f"{n} it is.") for n in range(ROWS)])
    inputs.write(folder / "pairs.jsonl", [inputs.pair(n, f"{n} it is.", f"No, not {n}.") for n in range(ROWS)])
    inputs.write(folder / "prompts.jsonl", [{"prompt": f"Say {n}."} for n in range(ROWS)])


def speed(output: Path) -> tuple[float, float]:
    """When the first step began, as a time of the clock, and steps a second, from the times of the two checkpoints."""
    half, end = (path.stat().st_mtime for path in watch.states(output)[-2:])
    return half - (end - half), HALF / (end - half)


def difference(one: Path, other: Path) -> str:
    """The largest, over all weights."""
    from safetensors.torch import load_file

    first, second = load_file(one), load_file(other)
    if first.keys() != second.keys():
        return "other weights"
    largest = max(float((first[key].double() - second[key].double()).abs().max()) for key in first)
    return "bitwise the same" if not largest else f"off by {largest:.1g}"


def timed(tool: Tool, job: Job, programs: Path, folder: Path) -> dict[str, str]:
    """One undisturbed run."""
    command = tool.command(job, folder, programs)
    if not command:
        return {KEYS[0]: "no such stage"}
    started = time.time()
    whole = watch.run(command, folder, folder / "whole.txt")
    output = folder / tool.result(job)
    if whole.code or tool.final(output) is None or len(watch.states(output)) < 2:
        return {KEYS[0]: f"fails, exit {whole.code}: {error(whole.text)}"}
    first, rate = speed(output)
    values = (f"{first - started:.1f} s", f"{rate:.1f}", f"{whole.cpu:.1f}", f"{whole.peak / 2**20:,.0f}")
    return dict(zip(KEYS, values, strict=False))


def kept(tool: Tool, job: Job, programs: Path, folder: Path) -> dict[str, str]:
    """The same run killed and continued, and the undisturbed one started once more at another rate."""
    output = folder / tool.result(job)
    done = tool.final(output)
    if done is None:
        return {}
    found = {KEYS[4]: killed(tool, replace(job, output="killed"), programs, folder, done)}
    before = (watch.digests(output), done.stat().st_mtime_ns)
    again = watch.run(tool.command(replace(job, rate=3e-4), folder, programs), folder, folder / "again.txt")
    now = watch.digests(output)
    if not done.exists():
        what = "the result is gone"
    elif done.stat().st_mtime_ns == before[1] and before[0].items() <= now.items():
        what = "kept"
    else:
        what = "written again, the same" if before[0].items() <= now.items() else "overwritten"
    return {**found, KEYS[5]: f"{what}, exit {again.code}"}


def killed(tool: Tool, job: Job, programs: Path, folder: Path, whole: Path) -> str:
    """SIGKILL a quarter of a second after the first checkpoint: how far the end then is from the undisturbed run's."""
    output = folder / tool.result(job)
    seen: list[float] = []

    def now() -> bool:
        if watch.states(output) and not seen:
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] > 0.25

    run = watch.run(tool.command(job, folder, programs), folder, folder / "killed.txt", now)
    if run.code is not None:
        return f"ended before the kill, exit {run.code}"
    again = watch.run(tool.command(replace(job, resume=True), folder, programs), folder, folder / "resumed.txt")
    done = tool.final(output)
    if again.code or done is None:
        return f"fails, exit {again.code}: {error(again.text)}"
    return difference(whole, done)


def error(text: str) -> str:
    """The error that a run ended with."""
    lines = [line for line in text.splitlines() if re.match(r"\S*(Error|Exception|error)\b", line)]
    rest = [line for line in text.splitlines() if line.strip()]
    return (lines or rest or [""])[-1].strip()[:110]


def typo(tool: Tool, programs: Path, folder: Path) -> dict[str, str]:
    """A misspelt key of SFT: the seconds until it is told."""
    job = Job("sft", "rows.jsonl", lora=True, rate=1e-4, misspelt=True)
    ran = watch.run(tool.command(job, folder, programs), folder, folder / "output.txt")
    values = (f"{ran.seconds:.2f}", f"{ran.cpu:.2f}", str(ran.code), error(ran.text) if ran.code else "nothing")
    return dict(zip(TYPO, values, strict=True))


def stages(tools: Sequence[Tool], names: Sequence[str], parts: Sequence[str], envs: Path) -> None:
    folder = envs / "stages"
    if not (folder / "inputs").exists():
        prepare(folder / "inputs")
    for tool in tools:
        programs = tool.programs(envs)
        for stage in names:
            place = folder / f"{tool.name} {stage}"
            record = place / "found.json"
            job = Job(stage, ROWS_OF.get(stage, ""), lora=True, rate=1e-4, save_steps=HALF, log_steps=10)
            if "time" in parts:
                watch.fresh(folder / "inputs", place)
                found = typo(tool, programs, place) if stage == "typo" else timed(tool, job, programs, place)
                record.write_text(json.dumps(found, indent=1))
            if "resume" in parts and stage != "typo":
                found = {**json.loads(record.read_text()), **kept(tool, job, programs, place)}
                record.write_text(json.dumps(found, indent=1))
            print(tool.name, "·", stage, "·", record.read_text(), file=sys.stderr, flush=True)
    for stage in names:
        keys = TYPO if stage == "typo" else KEYS
        print(f"\n| {stage} | " + " | ".join(keys) + " |\n|---" + "|---" * len(keys) + "|")
        for tool in TOOLS:
            if (record := folder / f"{tool.name} {stage}" / "found.json").exists():
                found = json.loads(record.read_text())
                print(f"| {tool.name} | " + " | ".join(found.get(key, "").replace("|", "/") for key in keys) + " |")
