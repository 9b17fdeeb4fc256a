"""Reward models that others have trained: encoders, whose score is read at their first token, and broken ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_architecture
from conftest import LORA, Posttrain, command, manifest, read_rows
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from posttrain import configure, evaluate
from posttrain.data.encode import ChatEncoder
from posttrain.models.load import load_tokenizer
from posttrain.rlhf.rewards import encoded_again

POSITIONS = 64
CONFIGS = {"bert": BertConfig, "deberta": DebertaV2Config, "modernbert": ModernBertConfig, "roberta": RobertaConfig}


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """[CLS] text [SEP], no BOS, no EOS, no template."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.?#:"
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({name: place for place, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **special)


def encoder(folder: Path, kind: str = "bert", **changes: Any) -> Path:
    """A reward model that reads in both directions."""
    tokenizer = bert_tokenizer()
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": POSITIONS, "num_labels": 1}
    sizes |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    if kind == "roberta":  # counts positions from the padding's id on
        sizes["max_position_embeddings"] += 1
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(CONFIGS[kind](**sizes | changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_encoder_rewards_ppo_and_scores_an_evaluation(posttrain: Posttrain, sources: Path, kind: str) -> None:
    reward = encoder(sources / "reward", kind)
    lora = LORA if kind == "bert" else ()
    done = posttrain(
        *command("ppo", "run", f"stage.reward_model={reward}", "stage.reward_functions=[]", "stage.gate=warn", *lora),
        "trainer.max_steps=2",
    )
    assert done.code == 0, done
    model = AutoModelForSequenceClassification.from_pretrained(reward).eval()
    tokenizer = bert_tokenizer()
    for line in read_rows("outputs/run/ppo/rollouts.jsonl"):
        text = f"### Instruction:\n{line['prompt'][-1]['content']}\n\n### Response:\n{line['answer']}"
        ids = tokenizer(text).input_ids
        if len(ids) > POSITIONS:
            ids = [ids[0], *ids[1 - POSITIONS :]]
        expected = model(torch.tensor([ids])).logits.item()
        assert line["reward"] == pytest.approx(expected, abs=1e-4)
    assert manifest("outputs/run/ppo")["inputs"]["reward_model"]["path"] == str(reward)


def test_an_evaluation_takes_an_encoder(entry: Any, sources: Path) -> None:
    reward, policy = encoder(sources / "reward"), save_architecture(sources / "policy", "qwen3")
    done = entry(
        evaluate.main,
        *(f"policies=[{policy}]", "data.dataset_name=prompts.jsonl", f"reward_model={reward}", "gate=warn"),
        *("max_length=96", "max_new_tokens=8", "out=found.json"),
    )
    assert done.code == 0, done
    assert len(set(json.loads(Path("found.json").read_text())[0]["scores"]["reward"])) > 1


def test_a_conversation_that_is_too_long_keeps_its_first_token_and_its_end(tmp_path: Path) -> None:
    path = encoder(tmp_path / "reward")
    tokenizer, _ = load_tokenizer(configure(f"model.model_name_or_path={path}", "data.dataset_name=x/y").model)
    read = encoded_again(ChatEncoder(tokenizer, allow_special_tokens=True), 16)
    ids = read([{"role": "user", "content": "what is this?"}], "it is a very long answer", [], [])
    assert len(ids) == 16
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


def test_an_encoder_is_no_policy(posttrain: Posttrain, sources: Path) -> None:
    path = encoder(sources / "encoder")
    done = posttrain(*command("sft", "run", f"model.model_name_or_path={path}"))
    assert done.code == 2, done
    assert "it can be a reward model only" in done.err


def test_a_reward_model_with_two_outputs_is_refused(posttrain: Posttrain, sources: Path) -> None:
    two = encoder(sources / "two", num_labels=2)
    done = posttrain(
        *command("ppo", "run", f"stage.reward_model={two}", "stage.reward_functions=[]", "stage.gate=warn")
    )
    assert done.code == 2, done
    assert f"stage.reward_model={two}: it has 2 outputs, one is needed" in done.err
