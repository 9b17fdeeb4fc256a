from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

tokenizer = AutoTokenizer.from_pretrained("model")
rows = load_dataset("json", data_files="rows.jsonl", split="train").map(
    lambda row: {
        "prompt": [{"role": "user", "content": row["instruction"]}],
        "completion": [{"role": "assistant", "content": row["response"]}],
    },
    remove_columns=["instruction", "response"],
)
split = rows.train_test_split(test_size=0.1, seed=42)
trainer = SFTTrainer(
    model="model",
    args=SFTConfig(
        output_dir="trl/sft",
        learning_rate=2e-4,
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
