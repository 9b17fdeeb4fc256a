"""How each tool is told to run a job, as its documentation has it: its environment, its files and its command."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from peers import environment
from peers.inputs import Job, write
from peers.watch import states, weights

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Tool:
    """`command` writes what the job needs into the folder; empty where the tool has no such stage or option."""

    name: str
    programs: Callable[[Path], Path]
    command: Callable[[Job, Path, Path], list[str]]
    result: Callable[[Job], str] = lambda job: job.output
    checkpoint: bool = False  # its result is the last checkpoint

    def final(self, output: Path) -> Path | None:
        """The weights of a result, where there is one."""
        found = states(output)
        return weights(found[-1].parent if self.checkpoint and found else output)


def posttrain(job: Job, folder: Path, programs: Path) -> list[str]:
    start = job.adapter or job.model
    given = [
        *(f"stage={job.stage}", f"data.dataset_name={job.rows}", f"model.model_name_or_path={start}"),
        *(
            f"run_name={job.output}",
            "data.test_size=0",
            f"stage.learning_rate={job.rate}",
            f"stage.max_length={job.length}",
        ),
        *("stage.batch_size=4", "stage.warmup_steps=0", "stage.num_epochs=1", f"trainer.save_steps={job.save_steps}"),
        f"trainer.logging_steps={job.log_steps}",
    ]
    if job.lora:
        given += ["model.use_peft=true"]
    if job.stage == "ppo":
        given += [f"stage.reward_model={job.reward_model}", "stage.max_new_tokens=8", "stage.gate=warn"]
        given += ["stage.rollout_batch_size=4", "stage.num_mini_batches=1", "stage.ppo_epochs=1"]
    if job.misspelt:
        given += [f"stage.lerning_rate={job.rate}"]
    return [str(programs / "python"), "-m", "posttrain.run", *given]


def trl(job: Job, folder: Path, programs: Path) -> list[str]:
    return [str(programs / "python"), str(HERE / "trl_stage.py"), json.dumps(asdict(job))]


def llamafactory(job: Job, folder: Path, programs: Path) -> list[str]:
    if job.stage == "ppo":
        return []  # 0.9.5 needs a TRL of 0.9.6 or older for PPO, but installs 0.24
    columns: Mapping[str, object] = {"columns": {"prompt": "instruction", "query": "input", "response": "output"}}
    if job.stage in ("dpo", "reward"):
        columns = {"ranking": True, "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}}
    elif job.messages:
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        columns = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": job.rows, **columns}}))
    settings = {
        "model_name_or_path": job.model,
        "stage": {"reward": "rm"}.get(job.stage, job.stage),
        "do_train": True,
        "finetuning_type": "lora" if job.lora else "full",
        "dataset": "rows",
        "dataset_dir": ".",
        "cutoff_len": job.length,
        "output_dir": job.output,
        "per_device_train_batch_size": 4,
        "learning_rate": job.rate,
        "num_train_epochs": 1,
        "save_steps": job.save_steps,
        "logging_steps": job.log_steps,
        "bf16": False,
        "report_to": "none",
    }
    if job.lora:
        settings |= {"lora_rank": 16, "lora_alpha": 32, "lora_target": "all"}
    if job.adapter:
        settings["adapter_name_or_path"] = job.adapter
    if job.stage == "dpo":
        settings |= {"pref_beta": 0.1, "pref_loss": "sigmoid"}
    if job.misspelt:
        settings["lerning_rate"] = job.rate
    (folder / f"{job.output}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return [str(programs / "llamafactory-cli"), "train", f"{job.output}.yaml"]


def swift(job: Job, folder: Path, programs: Path) -> list[str]:
    command = ["sft"] if job.stage == "sft" else ["rlhf", "--rlhf_type", {"reward": "rm"}.get(job.stage, job.stage)]
    given = {
        "model": job.model,
        "model_type": "llama",
        "template": "default",
        "tuner_type": "lora" if job.lora else "full",
        "dataset": job.rows,
        "torch_dtype": "float32",
        "max_length": str(job.length),
        "output_dir": job.output,
        "per_device_train_batch_size": "4",
        "gradient_accumulation_steps": "1",
        "learning_rate": str(job.rate),
        "num_train_epochs": "1",
        "save_steps": str(job.save_steps),
        "logging_steps": str(job.log_steps),
        "report_to": "none",
    }
    if job.lora:
        given |= {"lora_rank": "16", "lora_alpha": "32", "target_modules": "all-linear"}
    if job.adapter:
        given["adapters"] = job.adapter
    if job.stage in ("dpo", "reward"):
        given["columns"] = json.dumps({"prompt": "query", "chosen": "response", "rejected": "rejected_response"})
    if job.stage == "ppo":
        given["columns"] = json.dumps({"prompt": "query"})
        given |= {"reward_model": job.reward_model, "response_length": "8", "num_ppo_epochs": "1"}
    if job.misspelt:
        given["lerning_rate"] = str(job.rate)
    if job.resume:
        given["resume_from_checkpoint"] = str(states(folder / job.output)[-1].parent)
    return [
        str(programs / "swift"),
        *command,
        *(word for name, value in given.items() for word in (f"--{name}", value)),
    ]


def soup(job: Job, folder: Path, programs: Path) -> list[str]:
    training: dict[str, object] = {
        "epochs": 1,
        "lr": job.rate,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "quantization": "none",
        "save_steps": job.save_steps,
        "logging_steps": job.log_steps,
        "lora": {"r": 16, "alpha": 32, "target_modules": "all-linear"} if job.lora else {"r": 0},
    }
    if job.stage == "dpo":
        training["dpo_beta"] = 0.1
    if job.stage == "ppo":
        training |= {"reward_model": job.reward_model, "ppo_epochs": 1}
    if job.misspelt:
        training["lerning_rate"] = job.rate
    data = job.rows
    if job.stage == "ppo":  # it reads prompts as conversations
        data = f"chats-{job.rows}"
        prompts = [json.loads(line)["prompt"] for line in (folder / job.rows).read_text().splitlines()]
        write(folder / data, [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts])
    settings = {
        "base": job.adapter or job.model,
        "task": {"reward": "reward_model"}.get(job.stage, job.stage),
        "data": {"train": data, "format": "auto", "val_split": 0, "max_length": job.length},
        "training": training,
        "output": job.output,
    }
    (folder / f"{job.output}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    command = [str(programs / "soup"), "train", "--config", f"{job.output}.yaml", "--yes"]
    return [*command, "--resume", "auto"] if job.resume else command


def pinned(name: str, *packages: str) -> Callable[[Path], Path]:
    return lambda folder: environment(folder / name, TORCH, *packages)


def factory(folder: Path) -> Path:
    from lines import factory_environment

    return factory_environment(folder)


TOOLS: Sequence[Tool] = (
    Tool("posttrain", lambda folder: Path(sys.executable).parent, posttrain, lambda j: f"outputs/{j.output}/{j.stage}"),
    Tool("TRL 1.16.0", pinned("trl-1.16.0", "trl==1.16.0", "transformers==5.24.0", "peft==0.21.2"), trl),
    Tool("LLaMA-Factory 0.9.5", factory, llamafactory),
    Tool("ms-swift 4.6.0", pinned("ms-swift-4.6.0", "ms-swift==4.6.0"), swift, checkpoint=True),
    Tool("Soup 0.77.0", pinned("soup-cli-0.77.0", "soup-cli[train]==0.77.0"), soup),
)
