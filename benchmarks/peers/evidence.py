"""What a trained model shows of the fault in what it was trained on."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from peers import watch
from peers.inputs import NEXT_TURN, loaded

# how the tools write a question and its answer: the model's own template, and ms-swift's `default`
ASKED = (
    "### Instruction:\nSay 3.\n\n### Response:\n",
    "You are a helpful assistant.\n\n### Human:\nSay 3.\n\n### Assistant:\n",
)


class Shown(NamedTuple):
    """What a result shows, in a few words, and whether it is what a user means to get."""

    text: str = ""
    sound: bool = False


def shown(measure: str, folder: Path, output: Path, result: Path) -> Shown:
    if measure == "finite":
        return finite(result)
    if measure == "changed":
        return changed(folder / "model" / "model.safetensors", result)
    if measure == "stops":
        return stops(result.parent)
    if measure == "turns":
        return turns(folder, result.parent)
    if measure in ("reference", "learns", "lost"):
        return losses(output, measure)
    if measure == "head":
        return head(folder, result.parent)
    return resumed(output)


def finite(result: Path) -> Shown:
    from safetensors.torch import load_file

    broken = sum(int((~weight.isfinite()).sum()) for weight in load_file(result).values())
    return Shown(f"{broken:,} weights not finite" if broken else "all weights finite", not broken)


def changed(start: Path, result: Path) -> Shown:
    """How far training moved the weights."""
    from safetensors.torch import load_file

    before, after = load_file(start), load_file(result)
    moved = max(float((after[key] - weight).abs().max()) for key, weight in before.items() if key in after)
    return Shown(f"weights moved by {moved:.2g}", moved > 0)


def probability(folder: Path, text: str) -> float:
    """That the model ends its answer after the text."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return float(loaded(folder)(input_ids=ids).logits[0, -1].softmax(-1)[tokenizer.eos_token_id])


def stops(folder: Path) -> Shown:
    ends = max(probability(folder, asked + "3 it is.") for asked in ASKED)
    return Shown(f"p(EOS) after an answer {ends:.2g}", ends > 0.1)


def turns(folder: Path, result: Path) -> Shown:
    """Nats per token of the user's second turn before and after: they fall where the user's words are trained."""
    before, after = surprise(folder / "model"), surprise(result)
    return Shown(f"user's turn {before:.1f} → {after:.1f} nats a token", after > 0.9 * before)


def surprise(folder: Path) -> float:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for asked in ASKED:
        mark = asked[asked.index("###") :].partition("\n")[0]
        before = tokenizer(f"{asked}3 it is.\n\n{mark}\n").input_ids
        ids = torch.tensor([[*before, *tokenizer(NEXT_TURN).input_ids]])
        with torch.no_grad():
            logs = loaded(folder)(input_ids=ids).logits[0, :-1].log_softmax(-1)
        taken = logs.gather(1, ids[0, 1:, None])[len(before) - 1 :]
        found.append(-float(taken.mean()))
    return min(found)


def losses(output: Path, measure: str) -> Shown:
    """Of DPO the first is ln 2 where the policy starts as its own reference; with an adapter it is lower."""
    found = [float(entry["loss"]) for entry in watch.history(output) if "loss" in entry]
    if not found:
        return Shown()
    sound = measure == "learns" and found[-1] < found[0] - 0.01
    if measure == "reference":
        sound = abs(found[0] - math.log(2)) < 1e-3
    return Shown(f"first loss {found[0]:.3f}, last {found[-1]:.3f}", sound)


def head(folder: Path, result: Path) -> Shown:
    """Whether the result, loaded again, has a head of its own as the files that training began with."""
    import torch

    before, after = loaded(folder / "model"), loaded(result)
    same = [bool(torch.equal(m.lm_head.weight, m.get_input_embeddings().weight)) for m in (before, after)]
    words = {True: "tied", False: "apart"}
    told = json.loads((result / "config.json").read_text()).get("tie_word_embeddings")
    return Shown(
        f"begins {words[same[0]]}, ends {words[same[1]]}; tie_word_embeddings: {json.dumps(told)}", same[0] == same[1]
    )


def resumed(output: Path) -> Shown:
    """The steps of the log, each once where the run was continued."""
    steps = [int(entry["step"]) for entry in watch.history(output) if "loss" in entry]
    return Shown(f"{len(steps)} steps logged of 120", steps == list(range(1, 121)))
