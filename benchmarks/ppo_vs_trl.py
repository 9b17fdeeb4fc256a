"""PPO against the last one of TRL (1.12, trl.experimental.ppo): the same numbers, speed and memory.

    python benchmarks/ppo_vs_trl.py [folder]

Installs TRL 1.12.0 into an environment of its own in the folder, lets it and posttrain do the same work on the same
random model, prompts and reward model, and prints ratios; then puts TRL's last rollout through posttrain's arithmetic.
In the first case completions never end by themselves, so that both learn from the same number of tokens, and because
TRL puts the score of a completion that ends early one token behind its end (huggingface/trl#3750), which posttrain does
not. In the second one prompts and completions have log-normal lengths (peers/lengths.py), the same ones for both.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers import environment
from peers.lengths import COMPLETION, PROMPT, draw

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PEER = ["torch==2.13.0", "trl==1.12.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0"]
ROLLOUTS, EPISODES, BATCH = 3, 32, 8
CASES = {"equal lengths": ("prompts", 32), "log-normal lengths": ("lengths", COMPLETION[-1])}
LIMIT = 1e-5
SIZES = {"n_embd": 256, "n_layer": 6, "n_head": 4, "vocab_size": 50257, "n_positions": 128}
SETTINGS = [
    *("stage=ppo", "stage.gate=warn", f"stage.rollout_batch_size={EPISODES}", f"stage.batch_size={BATCH}"),
    *("stage.num_mini_batches=1", "stage.ppo_epochs=4", "stage.max_length=128"),
    *("stage.learning_rate=1e-4", "stage.kl_coef=0.1", "data.test_size=0", "trainer.eval_strategy=no"),
    *("trainer.save_strategy=no", f"stage.num_epochs={ROLLOUTS}"),
]
# posttrain.run in this process, with a note of time and memory when training ends: what comes after is no part of it
WATCH = """
import json, os, resource, sys, time
from peers.lengths import ended_completions
from transformers import Trainer
train = Trainer.train
def watched(self, *arguments, **options):
    started = time.monotonic()
    with ended_completions(os.environ["PROMPTS"] == "lengths"):
        result = train(self, *arguments, **options)
    noted = {"seconds": time.monotonic() - started, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    print(json.dumps(noted), file=sys.stderr)
    return result
Trainer.train = watched
import torch
torch.set_num_threads(2)
from posttrain.run import main
main()
"""


def prepare(folder: Path) -> None:
    """A random policy that never says its EOS, a reward model of the same shape, and one rollout of prompts."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    from posttrain.data.template import plain_template

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "posttrain" / "tiny")
    tokenizer.chat_template = plain_template(tokenizer)
    config = GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0, pad_token_id=1, num_labels=1)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        vars(config)[name] = 0.0
    policy = GPT2LMHeadModel(config)
    tokenizer.save_pretrained(folder / "policy")
    with torch.no_grad():
        policy.transformer.wte.weight[:2] = 0  # the logit of EOS and padding is 0 ...
        policy.transformer.ln_f.bias.fill_(0.5)
        policy.transformer.wte.weight[2:] += 0.4  # ... and that of any other token about 50
    policy.save_pretrained(folder / "policy")
    GPT2ForSequenceClassification(config).save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")
    rows = [{"prompt": f"What is the word number {n} of this list?"} for n in range(EPISODES)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"prompt": f"{n}" + " a" * length} for n, length in enumerate(draw(EPISODES, 1, *PROMPT))]
    (folder / "lengths.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": f"no {n}"} for n in range(16)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))


def run(command: list[str], folder: Path, last: str = "stdout", prompts: str = "") -> dict[str, float]:
    """Run it and read the JSON that it prints on its last such line."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={
            **os.environ,
            **{"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", "HF_HUB_OFFLINE": "1"},
            **{"TRL_EXPERIMENTAL_SILENCE": "1", "PROMPTS": prompts},
        },
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in vars(done)[last].splitlines() if line.startswith('{"seconds"')]
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(command[:4])}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    found: dict[str, float] = json.loads(lines[-1])
    return found


def parity(folder: Path) -> dict[str, float]:
    """The largest difference of each number on TRL's own rollout."""
    import numpy as np
    import torch

    from posttrain.rlhf import losses

    theirs = {name: torch.from_numpy(value) for name, value in np.load(folder / "trl.npz").items()}
    mask = torch.ones_like(theirs["rewards"])
    rewards = losses.token_rewards(theirs["scores"], theirs["kl"], mask, kl_coef=0.1)
    advantages, returns = losses.generalised_advantages(rewards, theirs["values"], mask, gamma=1.0, lam=0.95)
    whitened = losses.whiten(advantages, mask, losses.moments(advantages, mask))
    part = torch.ones_like(theirs["new_logprobs"])
    policy = losses.policy_loss(theirs["new_logprobs"], theirs["mb_logprobs"], theirs["mb_advantage"], part, 0.2).loss
    value = losses.value_loss(theirs["vpred"], theirs["mb_values"], theirs["mb_return"], part, 0.2)
    pairs: dict[str, tuple[Any, Any]] = {
        "rewards per token": (rewards, theirs["rewards"]),
        "advantages": (advantages, theirs["advantages"]),
        "whitened advantages": (whitened, theirs["whitened"]),
        "returns": (returns, theirs["returns"]),
        "policy loss": (losses.masked_mean(policy, part), theirs["pg_loss"]),
        "value loss": (losses.masked_mean(value, part), theirs["vf_loss"]),
    }
    return {name: float((ours - their).abs().max()) for name, (ours, their) in pairs.items()}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="ppo-vs-trl-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    python = str(environment(folder / "trl-1.12", *PEER) / "python")
    idle = run(
        [
            sys.executable,
            "-c",
            "import json, resource, trl.trainer.rloo_trainer as _; print(json.dumps({'seconds': 0, "
            "'peak': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))",
        ],
        folder,
    )["peak"]
    reward = [sys.executable, "-m", "posttrain.run", "stage=reward", "model.use_peft=true", "run_name=lora"]
    reward += [f"model.model_name_or_path={folder / 'policy'}", f"data.dataset_name={folder / 'pairs.jsonl'}"]
    subprocess.run(
        [*reward, "stage.max_length=96", "+trainer.max_steps=1", "overwrite=true", "data.test_size=4"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    print(f"idle, libraries imported: {idle:.2f} GiB")
    full = [f"stage.reward_model={folder / 'reward'}", "run_name=full"]
    lora = ["model.use_peft=true", "run_name=lora"]
    runs: dict[str, dict[str, dict[str, float]]] = {}
    for case, (prompts, tokens) in reversed(CASES.items()):  # the numbers of the last one are compared below
        peer = [python, str(ROOT / "benchmarks" / "peers" / "trl_ppo.py"), str(folder)]
        sizes = [str(number) for number in (ROLLOUTS, EPISODES, BATCH, tokens)]
        ours = [sys.executable, "-c", WATCH, *SETTINGS, f"model.model_name_or_path={folder / 'policy'}"]
        ours += [f"data.dataset_name={folder / prompts}.jsonl", f"stage.max_new_tokens={tokens}", "overwrite=true"]
        commands = {
            "TRL 1.12, full": [*peer, "full", *sizes],
            "posttrain, full": [*ours, *full],
            "posttrain, full, critic=head": [*ours, *full, "stage.critic=head"],
            "TRL 1.12, LoRA": [*peer, "lora", *sizes],
            "posttrain, LoRA, shared base": [*ours, *lora],
        }
        found = runs.setdefault(case, {})
        print(case)
        for name, command in commands.items():
            each = found[name] = run(command, folder, "stdout" if command[0] == python else "stderr", prompts)
            first = found["TRL 1.12, full"]
            speed, memory = ROLLOUTS * EPISODES / each["seconds"], each["peak"] - idle
            print(
                f"{name:<30} {speed:6.2f} episodes/s ({first['seconds'] / each['seconds']:.2f} ×)   "
                f"{memory:5.2f} GiB above idle ({memory / (first['peak'] - idle):.2f} ×)",
                flush=True,
            )
    differences = parity(folder)
    print("on TRL's own rollout, largest differences:")
    for name, difference in differences.items():
        print(f"{name:<22} {difference:.1e}   limit {LIMIT:g}")
    (folder / "ppo_vs_trl.json").write_text(json.dumps({"runs": runs, "idle": idle, "parity": differences}, indent=1))
    if max(differences.values()) > LIMIT:
        raise SystemExit("the arithmetic differs")


if __name__ == "__main__":
    main()
