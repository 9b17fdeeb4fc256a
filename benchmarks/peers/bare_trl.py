"""What a user would write with TRL alone, on data and a model that gpu.py has put ready; run by it, as a process."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    case: dict[str, Any] = json.loads(sys.argv[1])
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    torch.set_num_threads(case["threads"])
    on_gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(case["model"])
    rows = [json.loads(line) for line in Path(case["rows"]).read_text().splitlines()]

    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    shared = {
        "output_dir": case["output"],
        "per_device_train_batch_size": case["batch"],
        "max_steps": case["steps"],
        "max_length": case["length"],
        "learning_rate": 1e-4,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    adapter = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear") if case["lora"] else None
    causal = AutoModelForCausalLM.from_pretrained(case["model"]) if case["stage"] != "reward" else None
    trainer: Any
    if case["stage"] == "sft":
        data = [
            {"prompt": said("user", r["instruction"]), "completion": said("assistant", r["response"])} for r in rows
        ]
        trainer = SFTTrainer(
            model=causal,
            args=SFTConfig(**shared),
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
            peft_config=adapter,
        )
    else:
        data = [
            {
                "prompt": said("user", row["prompt"]),
                "chosen": said("assistant", row["chosen"]),
                "rejected": said("assistant", row["rejected"]),
            }
            for row in rows
        ]
        if case["stage"] == "dpo":
            trainer = DPOTrainer(
                model=causal,
                args=DPOConfig(**shared),
                train_dataset=Dataset.from_list(data),
                processing_class=tokenizer,
                peft_config=adapter,
            )
        else:
            scorer = AutoModelForSequenceClassification.from_pretrained(case["model"], num_labels=1)
            scorer.config.pad_token_id = tokenizer.pad_token_id
            if adapter is not None:
                adapter.task_type = "SEQ_CLS"
            trainer = RewardTrainer(
                model=scorer,
                args=RewardConfig(**shared),
                train_dataset=Dataset.from_list(data),
                processing_class=tokenizer,
                peft_config=adapter,
            )
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak}))


if __name__ == "__main__":
    main()
