"""Several runs in one launch, under any engine of accelerate's, FSDP2 on CPU processes among them.

`python engines.py <tasks.json>`: a task is {"overrides", "stop"}. A run with `stop` fails once the checkpoint of that
step is written, and leaves its folder as a kill would. What became of each is a line of <tasks.json>.<process>.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def allow_fsdp_on_cpu() -> None:
    """accelerate 1.15 has FSDP for every kind of several processes but those on a CPU: a list leaves them out."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    init = AcceleratorState.__init__

    def with_fsdp(self: Any, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        init(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = with_fsdp


def main() -> None:
    tasks = Path(sys.argv[1])
    sys.path.insert(0, str(Path.cwd()))
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        # its own collectives in shared memory take minutes to build, and a build that is killed hangs the next one
        import importlib

        importlib.import_module("deepspeed.comm.torch")
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    from torch.distributed.fsdp import FSDPModule
    from transformers import TrainerCallback

    from posttrain import configure, run_stage

    class Stop(TrainerCallback):
        def __init__(self, step: int) -> None:
            self.step = step
            self.units = 0  # that FSDP gathers one by one

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
            self.units = sum(isinstance(module, FSDPModule) for module in model.modules())

        def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == self.step:
                raise RuntimeError(f"stopped after step {self.step}")

    for task in json.loads(tasks.read_text()):
        said, callback = "", Stop(task["stop"])
        try:
            run_stage(configure(*task["overrides"]), callbacks=[callback])
        except BaseException:
            said = traceback.format_exc()
        with Path(f"{tasks}.{os.environ['RANK']}").open("a") as file:
            file.write(json.dumps({"said": said, "units": callback.units}) + "\n")
        if said and not task["stop"]:
            raise SystemExit(said)


if __name__ == "__main__":
    main()
