from datasets import load_dataset
from transformers import AutoTokenizer
from trl import RLOOConfig, RLOOTrainer

tokenizer = AutoTokenizer.from_pretrained("trl/sft")
prompts = load_dataset("json", data_files="prompts.jsonl", split="train").map(
    lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]}
)
split = prompts.train_test_split(test_size=0.1, seed=42)
trainer = RLOOTrainer(
    model="trl/sft",
    reward_funcs="trl/reward",
    args=RLOOConfig(
        output_dir="trl/rloo",
        beta=0.1,
        learning_rate=1e-6,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=8,
        max_steps=2,
        disable_dropout=True,
        bf16=False,
        report_to="none",
    ),
    train_dataset=split["train"],
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()
