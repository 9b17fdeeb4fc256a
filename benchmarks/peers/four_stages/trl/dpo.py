from datasets import load_dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

tokenizer = AutoTokenizer.from_pretrained("trl/sft")
pairs = load_dataset("json", data_files="pairs.jsonl", split="train").map(
    lambda row: {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
)
split = pairs.train_test_split(test_size=0.1, seed=42)
trainer = DPOTrainer(
    model="trl/sft",
    args=DPOConfig(
        output_dir="trl/dpo",
        beta=0.1,
        learning_rate=1e-5,
        per_device_train_batch_size=4,
        max_steps=2,
        max_length=64,
        eval_strategy="steps",
        eval_steps=2,
        bf16=False,
        report_to="none",
    ),
    train_dataset=split["train"],
    eval_dataset=split["test"],
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()
