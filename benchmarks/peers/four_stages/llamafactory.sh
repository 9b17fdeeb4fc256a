llamafactory-cli train llamafactory/sft.yaml
llamafactory-cli train llamafactory/reward.yaml
llamafactory-cli train llamafactory/dpo.yaml
