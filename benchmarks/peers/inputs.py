"""What the peers are given: small random models, rows, and the ten ways to break them, the same files for all.

Every model is a folder that `from_pretrained` loads, with the plain chat template; rows are JSON lines.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parents[2]
NEXT_TURN = "Thank you. Now tell me about the next number, please."


@dataclass(frozen=True)
class Job:
    """A run of one stage, for each peer to write down in its own words; paths are relative to the run's folder."""

    stage: str  # sft | reward | dpo | ppo
    rows: str  # file
    model: str = "model"
    adapter: str = ""  # the folder of a LoRA adapter to go on training
    lora: bool = False
    reward_model: str = "scorer"
    rate: float = 1e-2
    save_steps: int = 1000
    log_steps: int = 1
    length: int = 64  # tokens of a row
    misspelt: bool = False  # the learning rate once more, as lerning_rate
    messages: bool = False  # rows are conversations, of which the assistant's turns shall be trained
    resume: bool = False  # go on from a checkpoint, where a peer needs to be told
    output: str = "out"


@dataclass(frozen=True)
class Broken:
    """An input with one fault.

    `said` finds a line of the output, in lower case, that speaks of it; `measure` is what the result shows of it.
    """

    name: str
    job: Job
    said: str
    breaks: Callable[[Path], None] = field(default=lambda folder: None)
    measure: str = ""

    @property
    def unbroken(self) -> str:
        """The case without the fault: what is printed there, too, says nothing of it."""
        return "0b" if self.job.stage == "dpo" else "0c" if self.job.adapter else "0a"

    @property
    def key(self) -> str:
        return self.name.split()[0]


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def template() -> str:
    from transformers import AutoTokenizer

    from posttrain.data.template import plain_template

    return plain_template(AutoTokenizer.from_pretrained(ROOT / "posttrain" / "tiny"))


def save_model(folder: Path, chat_template: str, seed: int = 0, **changes: object) -> None:
    """A Llama with random weights, 160,000 of them, and the embedded tokenizer.

    The head has weights of its own: LLaMA-Factory 0.9.5 cannot save a reward model of one that shares them.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "posttrain" / "tiny")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{**shape, **ids, "vocab_size": 916, "max_position_embeddings": 512, "tie_word_embeddings": False, **changes}
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def save_scorer(folder: Path) -> None:
    """A reward model with random weights."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    model.save_pretrained(folder / "scorer")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / "model" / name, folder / "scorer")


def save_adapter(folder: Path) -> None:
    """A LoRA adapter of the model that has learnt a part of the rows."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(2)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    shape = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), shape)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for step in range(40):
        ids = tokenizer(f"### Response:\n{step} it is.", return_tensors="pt").input_ids
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.peft_config["default"].base_model_name_or_path = str(folder / "model")
    model.save_pretrained(folder / "adapter")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / "model" / file, folder / "adapter")


def prepare(folder: Path) -> None:
    """The unbroken inputs."""
    folder.mkdir(parents=True)
    save_model(folder / "model", template())
    save_scorer(folder)
    numbers = range(64)
    write(folder / "rows.jsonl", [row(f"Say {n}.", f"{n} it is.") for n in numbers])
    write(folder / "many.jsonl", [row(f"Say {n}.", f"{n} it is.") for n in range(480)])
    write(folder / "pairs.jsonl", [pair(n, f"{n} it is.", f"No, not {n}.") for n in numbers])
    write(folder / "prompts.jsonl", [{"prompt": f"Say {n}."} for n in range(320)])


def row(instruction: str, output: str) -> dict[str, str]:
    return {"instruction": instruction, "input": "", "output": output}


def pair(number: int, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": f"Say {number}.", "chosen": chosen, "rejected": rejected}


def edit_weights(folder: Path, change: "Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]") -> None:
    """Change the tensors of a folder's one file of weights."""
    from safetensors.torch import load_file, save_file

    file = next(folder.glob("*model.safetensors"))
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def long_prompts(folder: Path) -> None:
    """Every prompt fills max_length, so nothing of a response is left."""
    write(folder / "rows.jsonl", [row(f"Say {n} after all of this: " + "blue sky " * 120, "It is.") for n in range(64)])


def no_end(folder: Path) -> None:
    """The template writes nothing after an answer."""
    path = folder / "model" / "chat_template.jinja"
    changed = path.read_text().replace("+ eos_token +", "+")
    assert changed != path.read_text()
    path.write_text(changed)


def nan_weight(folder: Path) -> None:
    """One weight of the model is NaN."""

    def change(weights: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        weights["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
        return weights

    edit_weights(folder / "model", change)


def conversations(folder: Path) -> None:
    """Two turns each; the template does not mark which tokens are the assistant's."""
    write(
        folder / "chats.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": f"Say {n}."},
                    {"role": "assistant", "content": f"{n} it is."},
                    {"role": "user", "content": NEXT_TURN},
                    {"role": "assistant", "content": f"{n + 1} it is."},
                ]
            }
            for n in range(64)
        ],
    )


def apart(folder: Path) -> None:
    """config.json says that head and embedding are one matrix; the file has two that differ."""
    path = folder / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))


def lost_adapter(folder: Path) -> None:
    """An adapter saved from a compiled model: none of its names is one of the model's."""
    save_adapter(folder)
    edit_weights(
        folder / "adapter",
        lambda weights: {key.replace(".model.model.", ".model._orig_mod.model."): w for key, w in weights.items()},
    )


def equal_pairs(folder: Path) -> None:
    """In every pair both completions are the same."""
    write(folder / "pairs.jsonl", [pair(n, f"{n} it is.", f"{n} it is.") for n in range(64)])


SFT = Job("sft", "rows.jsonl")
DPO = Job("dpo", "pairs.jsonl", lora=True, rate=1e-3)
ON_ADAPTER = replace(SFT, adapter="adapter", lora=True, rate=1e-3)
UNBROKEN = (
    Broken("0a nothing: SFT", SFT, "$^", measure="stops"),
    Broken("0b nothing: DPO", DPO, "$^", measure="reference"),
    Broken("0c nothing: SFT from an adapter", ON_ADAPTER, "$^", save_adapter, "learns"),
)
BROKEN = (
    Broken(
        "1 every response cut off: prompts fill max_length",
        SFT,
        r"masked|no (rows|.{0,40}?(label|target|response|sample))|fill|filtered|nothing to|exceed|too long|truncat",
        long_prompts,
        "changed",
    ),
    Broken(
        "2 a template that never ends an answer",
        SFT,
        r"\beos\b|end of (the )?(turn|answer|sequence)|never ends",
        no_end,
        "stops",
    ),
    Broken(
        "3 DPO from an adapter, no reference named",
        replace(DPO, adapter="adapter"),
        r"reference|ref_model|ref_adapter",
        save_adapter,
        "reference",
    ),
    Broken("4 NaN in one weight", SFT, r"\bnan\b|finite", nan_weight, "finite"),
    Broken(
        "5 loss on the assistant alone, a template without marks",
        replace(SFT, rows="chats.jsonl", messages=True, length=128),
        r"\{% ?generation|assistant.{0,20}(mask|only)|mask",
        conversations,
        "turns",
    ),
    Broken("6 tied weights saved apart", SFT, r"\btie|\btied|lm_head", apart, "head"),
    Broken(
        "7 an adapter whose weights fit no layer",
        ON_ADAPTER,
        r"(missing|unexpected)( adapter| lora)? key|\| (missing|unexpected)|not.*loaded",
        lost_adapter,
        "lost",
    ),
    Broken(
        "8 chosen = rejected in all pairs",
        DPO,
        r"identical|the same|\bties\b|: rejected_response",
        equal_pairs,
        "learns",
    ),
    Broken("9 a misspelt key", replace(SFT, misspelt=True), r"lerning_rate"),
    Broken(
        "10 killed while saving a checkpoint, started again",
        replace(SFT, rows="many.jsonl", save_steps=20),
        r"incomplete|corrupt|damaged|intact|broken|deserializ|not finished|does not match|unreadable",
        measure="resumed",
    ),
)


def loaded(folder: Path) -> "PreTrainedModel":
    """A result, which may be an adapter."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)
