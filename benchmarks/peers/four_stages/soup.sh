soup train --config soup/sft.yaml --yes
soup train --config soup/reward.yaml --yes
soup train --config soup/dpo.yaml --yes
soup train --config soup/ppo.yaml --yes
