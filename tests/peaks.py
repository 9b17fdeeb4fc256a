"""The largest resident memory of two steps of SFT in this process, after a run of next to nothing in the same process.

`accelerate launch … peaks.py <folder>`: it holds gpt2/, nothing/ and rows.jsonl; peaks.<process> gets the bytes.
"""

import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    folder = Path(sys.argv[1])
    sys.path.insert(0, str(Path.cwd()))
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        from engines import allow_fsdp_on_cpu

        allow_fsdp_on_cpu()
    from transformers import TrainerCallback

    from posttrain import configure, run_stage

    class Peak(TrainerCallback):
        bytes = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == 1:  # the optimizer's state is there
                Path("/proc/self/clear_refs").write_text("5")

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == 3:
                [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
                self.bytes = int(line.split()[1]) * 1024
                raise RuntimeError("measured")

    found = []
    for name in ("nothing", "gpt2"):
        peak = Peak()
        where = (
            f"data.dataset_name={folder}/rows.jsonl",
            f"model.model_name_or_path={folder}/{name}",
            f"run_name={name}",
        )
        try:
            run_stage(configure("stage=sft", *sys.argv[2:], *where), callbacks=[peak])
        except RuntimeError as error:
            if "measured" not in str(error):
                raise
        found.append(peak.bytes)
    Path(f"{folder}/peaks.{os.environ['RANK']}").write_text(str(found[1] - found[0]))


if __name__ == "__main__":
    main()
