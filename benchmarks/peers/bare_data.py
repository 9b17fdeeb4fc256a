"""What a user would write with TRL alone, up to the first step: rows read, tokenised and cached; run by data.py."""

import sys


def main() -> None:
    stage, rows, model, output = sys.argv[1:]
    from datasets import load_dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    causal = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    data = load_dataset("json", data_files=rows, split="train")
    if stage == "sft":
        data = data.map(
            lambda row: {
                "prompt": [{"role": "user", "content": row["instruction"]}],
                "completion": [{"role": "assistant", "content": row["response"]}],
            },
            remove_columns=data.column_names,
        )
        split = data.train_test_split(0.05, seed=0)
        SFTTrainer(
            model=causal,
            args=SFTConfig(output_dir=output, use_cpu=True, bf16=False, report_to="none", max_length=1024),
            train_dataset=split["train"],
            eval_dataset=split["test"],
            processing_class=tokenizer,
        )
    else:
        data = data.map(
            lambda row: {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
        )
        split = data.train_test_split(0.05, seed=0)
        DPOTrainer(
            model=causal,
            ref_model=AutoModelForCausalLM.from_config(causal.config),
            args=DPOConfig(output_dir=output, use_cpu=True, bf16=False, report_to="none", max_length=1024),
            train_dataset=split["train"],
            eval_dataset=split["test"],
            processing_class=tokenizer,
        )


if __name__ == "__main__":
    main()
