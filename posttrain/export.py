"""Copy a finished model, with its card, to a folder or the Hub.

usage: posttrain export <folder of a finished run> to=<folder> | push_to_hub=<name>

  to=<folder>                 a new folder
  push_to_hub=<owner/name>    needs HF_TOKEN in the environment
  private=true                false: visible to everybody

The model is the merged one, which the run has found to give the trained model's
outputs; an adapter beside it is put on its base and compared once more.

examples:
  posttrain export outputs/demo/dpo to=exported
  posttrain export outputs/demo/dpo push_to_hub=me/my-model
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from posttrain.cli.command import read_words
from posttrain.cli.entry import entry_point
from posttrain.config.stages import STAGES
from posttrain.console import say
from posttrain.data.chat import ChatEncoder
from posttrain.errors import ConfigError, PosttrainError
from posttrain.models.resolve import adapter_base, input_hashes, parent_of
from posttrain.paths import PACKAGE
from posttrain.runs.folder import MANIFEST, PARTS, RunFolder
from posttrain.values import JsonObject

TOLERANCE = 1e-3
CARD = "README.md"


def read_export(arguments: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """The run's folder and the options.

    Raises:
        ConfigError: the run has not finished, or an option is missing or unknown.
    """
    words, options = read_words(arguments, ["to", "push_to_hub", "private"])
    if len(words) != 1:
        raise ConfigError("name one finished run: posttrain export outputs/demo/dpo to=exported")
    folder = Path(words[0])
    if not (folder / MANIFEST).is_file():
        raise ConfigError(f"{folder} is not a finished run (no {MANIFEST})")
    if not {"to", "push_to_hub"} & options.keys():
        raise ConfigError("say where: to=<folder>, or push_to_hub=<owner/name>")
    if "to" in options and Path(options["to"]).exists():
        raise ConfigError(f"to={options['to']} is there already")
    return folder, options


def model_card(manifest: JsonObject, encoder: ChatEncoder | None = None) -> str:
    """A card in the Hub's format: metadata, lineage, numbers, settings, versions; of a reward model how to score."""
    base = manifest["config"]["model"]["base_model"]
    metrics = {name: value for name, value in manifest["metrics"].items() if isinstance(value, (int, float))}
    environment = Environment(
        loader=FileSystemLoader(PACKAGE / "templates"), autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("model_card.md.jinja").render(
        manifest=manifest,
        stage=manifest["stage"],
        base=None if base.startswith("posttrain/") or Path(base).exists() else base,
        spec=STAGES[manifest["stage"]],
        metrics=metrics,
        end_of_text=None if encoder is None else encoder.end_of_text(),
        settings={name: value for name, value in manifest["config"]["stage"].items() if value is not None},
    )


def check_merge(folder: Path, manifest: JsonObject) -> float | None:
    """The largest relative difference of logits between the merged model and base with adapter; None without one.

    Raises:
        PosttrainError: it is more than rounding.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = folder / "adapter"
    if not (adapter / "adapter_config.json").is_file() or STAGES[manifest["stage"]].is_classifier:
        return None
    base = adapter_base(adapter)
    merged = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if loaded.get_input_embeddings().num_embeddings != merged.get_input_embeddings().num_embeddings:
        loaded.resize_token_embeddings(merged.get_input_embeddings().num_embeddings)
    apart = PeftModel.from_pretrained(loaded, str(adapter)).eval()
    torch.manual_seed(0)
    ids = torch.randint(0, merged.config.vocab_size, (2, 16))
    with torch.no_grad():
        one, other = merged(ids).logits, apart(ids).logits
    difference = float((one - other).abs().max() / other.abs().max().clamp(min=1))
    if difference > TOLERANCE:
        raise PosttrainError(f"{folder / 'model'} differs from its base with its adapter by {difference:.1e}")
    return difference


def main() -> None:
    """The entry point of `posttrain export`."""
    entry_point("export", _main)


def _main() -> None:
    folder, options = read_export(sys.argv[1:])
    manifest = parent_of(folder / "model")
    assert manifest is not None  # read_export has looked
    for part in PARTS:
        input_hashes(folder / part)
    for name, what in RunFolder(folder).damage(manifest).items():
        raise ConfigError(f"{folder}/{name} {what}; train {folder} again with overwrite=true, or put the file back")
    difference = check_merge(folder, manifest)
    if difference is not None:
        say(f"merged model and base with adapter agree within {difference:.1e}")
    from transformers import AutoTokenizer

    scores = STAGES[manifest["stage"]].is_classifier
    card = model_card(manifest, ChatEncoder(AutoTokenizer.from_pretrained(folder / "model")) if scores else None)
    if "to" in options:
        target = Path(options["to"])
        shutil.copytree(folder / "model", target)
        (target / CARD).write_text(card, encoding="utf-8")
        shutil.copyfile(folder / MANIFEST, target / MANIFEST)
        say(f"exported: {target}")
    if "push_to_hub" in options:
        from huggingface_hub import HfApi

        api = HfApi()
        repo = options["push_to_hub"]
        api.create_repo(repo, private=options.get("private", "true").lower() != "false", exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder / "model"))
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD, repo_id=repo)
        say(f"pushed: https://huggingface.co/{repo}")


if __name__ == "__main__":
    main()
