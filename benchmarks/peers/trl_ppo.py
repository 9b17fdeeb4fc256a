"""TRL 1.12's PPO on the models and prompts of ppo_vs_trl.py; runs in that version's own environment.

    python benchmarks/peers/trl_ppo.py <folder> <full|lora> <rollouts> <episodes> <batch> <tokens>

Prints seconds and the largest resident memory as JSON, and writes what it computed on its last rollout to trl.npz.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    from peers.lengths import ended_completions

    folder, mode = Path(sys.argv[1]), sys.argv[2]
    rollouts, episodes, batch, tokens = map(int, sys.argv[3:])
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    given = os.environ["PROMPTS"]
    rows = [json.loads(line)["prompt"] for line in (folder / f"{given}.jsonl").read_text().splitlines()]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in rows
    ]
    data = Dataset.from_dict({"input_ids": [tokenizer(text).input_ids for text in prompts]})
    seen: dict[str, Any] = {}
    whiten, mean = ppo_trainer.masked_whiten, ppo_trainer.masked_mean

    def watch_whiten(values: Any, mask: Any, shift_mean: bool = True) -> Any:
        local = sys._getframe(1).f_locals
        found = whiten(values, mask, shift_mean)
        if "returns" in local:
            names = ("rewards", "values", "returns", "kl", "scores")
            seen.update(
                {name: local[name].clone() for name in names}, advantages=values.clone(), whitened=found.clone()
            )
        return found

    def watch_mean(values: Any, mask: Any, axis: Any = None) -> Any:
        local, found = sys._getframe(1).f_locals, mean(values, mask, axis)
        if values is local.get("pg_loss_max"):
            names = ("mb_advantage", "mb_logprobs", "new_logprobs", "mb_values", "vpred", "mb_return", "vf_loss")
            seen.update({name: local[name].detach().clone() for name in names}, pg_loss=found.detach().clone())
        return found

    ppo_trainer.masked_whiten, ppo_trainer.masked_mean = watch_whiten, watch_mean
    peft_config = None
    if mode == "lora":
        from peft import LoraConfig

        peft_config = LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear", fan_in_fan_out=True
        )
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=episodes // batch,
            num_mini_batches=1,
            num_ppo_epochs=4,
            total_episodes=rollouts * episodes,
            local_rollout_forward_batch_size=batch,
            response_length=tokens,
            temperature=1.0,
            kl_coef=0.1,
            learning_rate=1e-4,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=True,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        ref_model=None if mode == "lora" else AutoModelForCausalLM.from_pretrained(folder / "policy"),
        reward_model=AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1),
        value_model=AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1),
        train_dataset=data,
        peft_config=peft_config,
    )
    started = time.monotonic()
    with ended_completions(given == "lengths"):
        trainer.train()
    seconds = time.monotonic() - started
    np.savez(folder / "trl.npz", **{name: value.float().numpy() for name, value in seen.items()})
    print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


if __name__ == "__main__":
    main()
