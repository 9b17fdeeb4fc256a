python trl/sft.py
python trl/reward.py
python trl/dpo.py
python trl/rloo.py
