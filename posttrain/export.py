"""`python -m posttrain.export outputs/demo/dpo to=exported`: a finished model with its card, for a folder or the Hub.

Options: to=<folder>, push_to_hub=<owner/name>, private=true (false: for all to see). The model is the merged one that
the run has proven to give the trained model's outputs; an adapter beside it is put on its base and compared once more.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from posttrain import run
from posttrain.console import say
from posttrain.errors import ConfigError, PosttrainError
from posttrain.lineage import MANIFEST, PARTS, input_hashes, parent_of
from posttrain.paths import PACKAGE

TOLERANCE = 1e-3
CARD = "README.md"
TAGS = {"sft": "sft", "reward": "reward-trainer", "ppo": "ppo", "dpo": "dpo"}


def read_export(arguments: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """The run's folder and the options.

    Raises:
        ConfigError: the run has not finished, or an option is missing or unknown.
    """
    options: dict[str, str] = {}
    folders = []
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if not separator:
            folders.append(Path(argument))
        elif key in ("to", "push_to_hub", "private"):
            options[key] = value
        else:
            raise ConfigError(f"{key} is unknown; the options are to, push_to_hub, private")
    if len(folders) != 1:
        raise ConfigError("name one finished stage: python -m posttrain.export outputs/demo/dpo to=exported")
    if not (folders[0] / MANIFEST).is_file():
        raise ConfigError(f"{folders[0]} is no finished stage: {MANIFEST} is not there")
    if not {"to", "push_to_hub"} & options.keys():
        raise ConfigError("say where: to=<folder>, or push_to_hub=<owner/name>")
    if "to" in options and Path(options["to"]).exists():
        raise ConfigError(f"to={options['to']} is there already")
    return folders[0], options


def model_card(manifest: dict[str, Any]) -> str:
    """A card in the Hub's format: metadata, lineage, numbers, settings and versions."""
    base = manifest["config"]["model"]["base_model"]
    metrics = {name: value for name, value in manifest["metrics"].items() if isinstance(value, (int, float))}
    environment = Environment(loader=FileSystemLoader(PACKAGE), autoescape=False, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("model_card.md.jinja").render(
        manifest=manifest,
        stage=manifest["stage"],
        base=None if base.startswith("posttrain/") or Path(base).exists() else base,
        tag=TAGS[manifest["stage"]],
        metrics=metrics,
        settings={name: value for name, value in manifest["config"]["stage"].items() if value is not None},
    )


def check_merge(folder: Path, manifest: dict[str, Any]) -> float | None:
    """The largest relative difference of logits between the merged model and base with adapter; None without one.

    Raises:
        PosttrainError: it is more than rounding.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = folder / "adapter"
    if not (adapter / "adapter_config.json").is_file() or manifest["stage"] == "reward":
        return None
    base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
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
    """The entry point: exit codes as those of `posttrain.run`."""
    sys.exit(run.guarded(_main))


def _main() -> None:
    folder, options = read_export(sys.argv[1:])
    manifest = parent_of(folder / "model")
    assert manifest is not None  # read_export has looked
    for part in PARTS:
        input_hashes(folder / part)
    difference = check_merge(folder, manifest)
    if difference is not None:
        say(f"merged model and base with adapter agree within {difference:.1e}")
    card = model_card(manifest)
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
