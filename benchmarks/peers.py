"""posttrain against plain TRL, LLaMA-Factory, ms-swift and Soup: ten broken inputs, and the four stages.

    python benchmarks/peers.py --envs <folder> --what broken|stages [--only <tool> ...] [--cases 1 4 ...]

Each peer is installed into an environment of its own under the folder, by its first use. What every run printed is kept
in `<folder>/broken` or `<folder>/stages`.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peers import inputs, watch
from peers.evidence import Shown, shown
from peers.inputs import BROKEN, UNBROKEN, Broken
from peers.tools import TOOLS, Tool

# lines that only repeat what was asked for, or count rows and seconds
NOISE = re.compile(
    r"\d+%\||it/s|^\s*(File |Traceback|\^|~|[\"{])|^[,(]?\s*\w+ ?[:=] ?\S*,?$|^run sh:|trust_remote_code"
)
PLACE = re.compile(r"^\S+\.py:\d+: |^\[[^]]*\] \d\S+ \S+ >> |^\[[^]]*\] ?|^\w+(\.\w+)+\.(?=\w+Error: )")
SHOWN = 130  # characters of a line


def telling(text: str, pattern: str, usual: set[str]) -> str:
    """The line that speaks of a fault: the last error if it does, else the first that does, from where it does."""
    for line in (last(text), *text.splitlines()):
        if re.search(pattern, line.lower()) and not NOISE.search(line) and bare(line) not in usual:
            line = PLACE.sub("", line.strip())
            found = re.search(pattern, line.lower())
            start = max(0, (found.end() if found else 0) - SHOWN)
            return ("… " if start else "") + line[start : start + SHOWN]
    return ""


def bare(line: str) -> str:
    """A line without its numbers, times and places."""
    return re.sub(r"[\d.]+|/\S+", "", line).strip()


def last(text: str) -> str:
    """The error that a run ended with."""
    lines = [line for line in text.splitlines() if re.match(r"\S*(Error|Exception|error)\b", line)]
    rest = [line for line in text.splitlines() if line.strip()]
    return (lines or rest or [""])[-1].strip()


def verdict(code: int | None, sound: bool, said: str) -> str:
    """One word for what a user gets."""
    if code is None:
        return "hangs"
    if code:
        return "refused" if said else "fails"
    return "right" if sound else "warned" if said else "silent"


def broken_run(tool: Tool, case: Broken, programs: Path, source: Path, folder: Path) -> dict[str, str]:
    """Run one case with one tool, in a folder of its own."""
    watch.fresh(source, folder)
    case.breaks(folder)
    job = case.job
    command = tool.command(job, folder, programs)
    if not command:
        return {"exit": "–"}
    log = folder / "output.txt"
    output = folder / tool.result(job)
    if case.measure == "resumed":
        # a real kill, and then half of what was written last
        cut = watch.run(command, folder, folder / "killed.txt", lambda: len(watch.states(output)) >= 2)
        newest = watch.weights(watch.states(output)[-1].parent) if len(watch.states(output)) > 1 else None
        if newest is None:
            return {"exit": str(cut.code)}
        watch.halve(newest)
        command = tool.command(replace(job, resume=True), folder, programs)
    ran = watch.run(command, folder, log)
    return {"exit": str(ran.code)}


def judged(tool: Tool, case: Broken, folder: Path) -> dict[str, str]:
    """What was found of a case, with what its output says of the fault."""
    place = folder / slug(tool, case.key)
    found = json.loads((place / "found.json").read_text())
    if found["exit"] == "–":
        return {"exit": "–", "verdict": "–", "said": "no such stage"}
    output = place / tool.result(case.job)
    steps = max((int(path.parent.name.partition("-")[2]) for path in watch.states(output)), default=0)
    result = tool.final(output)
    code = None if found["exit"] == "None" else int(found["exit"])
    evidence = shown(case.measure, place, output, result) if code == 0 and result and case.measure else Shown()
    usual = folder / slug(tool, case.unbroken) / "output.txt"
    lines = {bare(line) for line in watch.plain(usual).splitlines()} if usual.exists() else set()
    text = watch.plain(place / "output.txt").replace(f"{place}/", "")
    said = telling(text, case.said, lines)
    return {
        "exit": found["exit"],
        "verdict": verdict(code, evidence.sound, said),
        "left": f"model, {steps} steps" if result else (f"{steps} steps, no model" if steps else "nothing"),
        "evidence": evidence.text,
        "said": said or (last(text)[:SHOWN] if code else "nothing"),
    }


def slug(tool: Tool, key: str) -> str:
    """A name of a folder that says nothing of the fault, for paths are printed."""
    return re.sub(r"\W+", "-", f"{tool.name} {key}")


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'")


def broken(tools: Sequence[Tool], cases: Sequence[Broken], envs: Path) -> None:
    folder = envs / "broken"
    if not (folder / "inputs").exists():
        inputs.prepare(folder / "inputs")
    for tool in tools:
        programs = tool.programs(envs)
        for case in cases:
            place = folder / slug(tool, case.key)
            found = broken_run(tool, case, programs, folder / "inputs", place)
            (place / "found.json").write_text(json.dumps(found, indent=1))
            print(tool.name, "·", case.name, "·", found, file=sys.stderr, flush=True)
    table = {
        case.name: {
            tool.name: judged(tool, case, folder)
            for tool in TOOLS
            if (folder / slug(tool, case.key) / "found.json").exists()
        }
        for case in (*UNBROKEN, *BROKEN)
    }
    names = [tool.name for tool in TOOLS]
    print("| input | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|")
    for case in (*UNBROKEN, *BROKEN):
        if table[case.name]:
            words = [table[case.name].get(name, {}).get("verdict", "") for name in names]
            print(f"| {case.name} | " + " | ".join(words) + " |")
    print("\n| input | tool | exit | left | what the result shows | what it said |\n|---|---|---|---|---|---|")
    for case in (*UNBROKEN, *BROKEN):
        for name in names:
            if found := table[case.name].get(name):
                values = [found.get(key, "") for key in ("exit", "left", "evidence", "said")]
                print(f"| {case.name} | {name} | " + " | ".join(map(cell, values)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, required=True, help="folder for the environments and what was printed")
    parser.add_argument("--what", choices=["broken", "stages"], required=True)
    parser.add_argument("--only", nargs="*", default=[], help="tools, by the beginning of their names")
    parser.add_argument(
        "--cases", nargs="*", default=[], help="broken inputs, by their numbers (0a, 0b and 0c: unbroken)"
    )
    parser.add_argument("--stages", nargs="*", default=["typo", "sft", "reward", "dpo", "ppo"])
    parser.add_argument("--parts", nargs="*", default=["time", "resume"], help="of the stages; time first")
    given = parser.parse_args()
    envs = given.envs.resolve()
    tools = [tool for tool in TOOLS if not given.only or tool.name.startswith(tuple(given.only))]
    if given.what == "broken":
        cases = [c for c in (*UNBROKEN, *BROKEN) if not given.cases or c.key in given.cases]
        broken(tools, cases, envs)
    else:
        from peers.stages import stages

        stages(tools, given.stages, given.parts, envs)


if __name__ == "__main__":
    main()
