"""One stage as a plain TRL script would write it: python trl_stage.py '<job as JSON>' (see inputs.Job)."""

import json
import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from transformers.trainer_utils import get_last_checkpoint

set_seed(42)  # the reward model's head is drawn before the trainer does so
job = json.loads(sys.argv[1])
stage, output = job["stage"], job["output"]
common = {
    "output_dir": output,
    "learning_rate": job["rate"],
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1,
    "save_steps": job["save_steps"],
    "logging_steps": job["log_steps"],
    "bf16": False,
    "report_to": "none",
    **({"lerning_rate": job["rate"]} if job["misspelt"] else {}),
}
lora = None
if job["lora"] and not job["adapter"]:
    from peft import LoraConfig

    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS" if stage == "reward" else "CAUSAL_LM"
    )
tokenizer = AutoTokenizer.from_pretrained(job["model"])
rows = load_dataset("json", data_files=job["rows"], split="train")


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def start():
    model = AutoModelForCausalLM.from_pretrained(job["model"])
    if job["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    return model


if stage in ("dpo", "reward"):
    rows = rows.map(
        lambda row: {
            "prompt": said("user", row["prompt"]),
            "chosen": said("assistant", row["chosen"]),
            "rejected": said("assistant", row["rejected"]),
        }
    )
elif stage == "ppo":
    rows = rows.map(lambda row: {"prompt": said("user", row["prompt"])})
elif not job["messages"]:
    rows = rows.map(
        lambda row: {
            "prompt": said("user", row["instruction"]),
            "completion": said("assistant", row["output"]),
        },
        remove_columns=["instruction", "input", "output"],
    )

if stage == "sft":
    from trl import SFTConfig, SFTTrainer

    only = {"assistant_only_loss": True} if job["messages"] else {}
    trainer = SFTTrainer(
        model=start(),
        args=SFTConfig(max_length=job["length"], **only, **common),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
    )
elif stage == "reward":
    from trl import RewardConfig, RewardTrainer

    model = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(max_length=job["length"], **common),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
    )
elif stage == "dpo":
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=start(),
        args=DPOConfig(max_length=job["length"], beta=0.1, **common),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
    )
else:  # TRL has no PPO any more
    from trl import RLOOConfig, RLOOTrainer

    trainer = RLOOTrainer(
        model=start(),
        reward_funcs=job["reward_model"],
        args=RLOOConfig(
            max_steps=len(rows) // 4,
            beta=0.1,
            num_generations=2,
            max_completion_length=8,
            disable_dropout=True,
            **common,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
    )
newest = get_last_checkpoint(output) if job["resume"] and Path(output).is_dir() else None
trainer.train(resume_from_checkpoint=newest)
trainer.save_model()
