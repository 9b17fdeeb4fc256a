python -m posttrain.pipeline model.model_name_or_path=model trainer.max_steps=2 ppo.max_new_tokens=8 ppo.gate=warn \
  data.instructions=rows.jsonl data.preferences=pairs.jsonl data.prompts=prompts.jsonl
