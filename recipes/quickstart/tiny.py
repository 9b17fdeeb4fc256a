"""Writes posttrain/tiny, the embedded default model: a GPT-2 config of 0.8 million parameters and its tokenizer.

`python recipes/quickstart/tiny.py`. The tokenizer is a byte-level BPE learned from the quickstart's own text:
any text can be written in it, that text most briefly. The weights are drawn when a run starts (model.from_scratch).
"""

import json
from pathlib import Path

import world
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, PreTrainedTokenizerFast

FOLDER = Path(__file__).resolve().parents[2] / "posttrain" / "tiny"
END, PAD = "<|endoftext|>", "<|pad|>"


def corpus() -> list[str]:
    texts = ["### System:\n", "### Instruction:\n", "### Response:\n"] * 100
    for row in world.preferences():
        texts += [row["prompt"], row["chosen"], row["rejected"]]
    return texts


def main() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=512
    )
    fast.save_pretrained(FOLDER)
    config = GPT2Config(
        architectures=["GPT2LMHeadModel"],
        vocab_size=len(fast),
        n_positions=512,
        n_embd=128,  # bitsandbytes quantises in blocks of 64
        n_layer=3,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    (FOLDER / "config.json").write_text(json.dumps(config.to_diff_dict(), indent=2) + "\n")


if __name__ == "__main__":
    main()
