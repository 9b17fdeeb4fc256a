"""Copy a finished model, with its card, to a folder or the Hub.

usage: posttrain export <folder of a finished run> to=<folder> | push_to_hub=<name>

  to=<folder>                 a new folder; how to serve it is printed
  to_gguf=q8_0                llama.cpp's format beside it (f32, f16, bf16, q8_0,
                              auto), by the script of llama_cpp=<its folder>
  license=apache-2.0          for the card; default: that of a base model's folder
  push_to_hub=<owner/name>    needs HF_TOKEN in the environment
  private=true                false: visible to everybody

The model is the merged one, which the run has found to give the trained model's
outputs; an adapter beside it is put on its base and compared once more.

examples:
  posttrain export outputs/demo/dpo to=exported
  posttrain export outputs/demo/dpo to=exported to_gguf=q8_0 llama_cpp=llama.cpp
  posttrain export outputs/demo/dpo push_to_hub=me/my-model
"""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from posttrain.cli.command import read_words
from posttrain.cli.entry import entry_point
from posttrain.config.stages import STAGES
from posttrain.config.suggest import one_of
from posttrain.console import say, warn
from posttrain.data.chat import ChatEncoder
from posttrain.errors import ConfigError, PosttrainError
from posttrain.metrics import comparison
from posttrain.metrics.catalogue import label, with_gold_apart
from posttrain.models.resolve import adapter_base, input_hashes, parent_of
from posttrain.paths import EMBEDDED, PACKAGE
from posttrain.runs.checkpoint import modes_by_umask
from posttrain.runs.folder import MANIFEST, PARTS, RunFolder, read_json
from posttrain.values import JsonObject

TOLERANCE = 1e-3
CARD = "README.md"
OPTIONS = ("to", "to_gguf", "llama_cpp", "push_to_hub", "private", "license")
CONVERT = "convert_hf_to_gguf.py"  # of llama.cpp
KINDS = ("q8_0", "f16", "bf16", "f32", "auto")  # that it writes
# architectures whose safetensors every version of `ollama create` takes as they are
# (https://docs.ollama.com/import)
OLLAMA = ("LlamaForCausalLM", "MistralForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM")
ASKED = "What is the capital of France?"


def read_export(arguments: Sequence[str]) -> tuple[Path, dict[str, str]]:
    """The run's folder and the options.

    Raises:
        ConfigError: the run has not finished, or an option is missing or unknown.
    """
    words, options = read_words(arguments, OPTIONS)
    if len(words) != 1:
        raise ConfigError("name one finished run: posttrain export outputs/demo/dpo to=exported")
    folder = Path(words[0])
    if not (folder / MANIFEST).is_file():
        raise ConfigError(f"{folder} is not a finished run (no {MANIFEST})")
    if not {"to", "push_to_hub"} & options.keys():
        raise ConfigError("say where: to=<folder>, or push_to_hub=<owner/name>")
    if "to" in options and Path(options["to"]).exists():
        raise ConfigError(f"to={options['to']} is there already")
    if options.get("to_gguf", KINDS[0]) not in KINDS:
        raise ConfigError(one_of("to_gguf", options["to_gguf"], KINDS))
    if ("to_gguf" in options) != ("llama_cpp" in options) or ("to_gguf" in options and "to" not in options):
        raise ConfigError("to_gguf=q8_0 goes with llama_cpp=<folder of llama.cpp> and to=<folder>")
    script = Path(options.get("llama_cpp", ""), CONVERT)
    if "to_gguf" in options and not script.is_file():
        raise ConfigError(f"llama_cpp: no {script}; name a clone of https://github.com/ggml-org/llama.cpp")
    if "to" in options and Path(options["to"]).resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"to={options['to']} lies in the run's own folder {folder}; choose another one")
    return folder, options


def model_card(folder: Path, manifest: JsonObject, licence: str | None, encoder: ChatEncoder) -> str:
    """A card in the Hub's format: metadata, lineage, data, an example, numbers, settings, versions."""
    base, metrics, data = manifest["inputs"]["model"]["path"], manifest["metrics"], manifest["data"]
    while (earlier := parent_of(Path(base) / "model")) is not None:  # a run of ours: what that one started from
        base = earlier["inputs"]["model"]["path"]
    spec, rows_of = STAGES[manifest["stage"]], data.get("rows_of", {})
    if licence is None and (card := Path(base, CARD)).is_file():
        from huggingface_hub import ModelCard
        from yaml import YAMLError

        try:
            licence = ModelCard.load(card).data.license
        except (YAMLError, ValueError) as error:
            warn(f"{card} cannot be read for its licence ({type(error).__name__}); license= names it")
    environment = Environment(
        loader=FileSystemLoader(PACKAGE / "templates"), autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("model_card.md.jinja").render(
        manifest=manifest,
        stage=manifest["stage"],
        base=base,
        is_on_hub=base != EMBEDDED and not Path(base).exists(),
        licence=licence,
        spec=spec,
        # a path of this machine says nothing elsewhere
        sources=[(Path(name).name if Path(name).exists() else name, rows) for name, rows in rows_of.items()],
        numbers=[
            (label(key), *comparison.before_and_after(key, metrics))
            for key in with_gold_apart(spec.shown, metrics)
            if key in metrics
        ],
        evaluations=list(evaluations(folder)),
        asked=ASKED,
        end_of_text=encoder.end_of_text() if spec.is_classifier else None,
        settings={name: value for name, value in manifest["config"]["stage"].items() if value is not None},
    )


def evaluations(folder: Path) -> Iterator[tuple[str, str, int, list[tuple[str, str]]]]:
    """Of each evaluation beside a stage that has its model: file, first policy, number of prompts, labels and cells."""
    for file in sorted(folder.absolute().parent.glob(f"{Path(comparison.FILE).stem}*.json")):
        found = read_json(file, "delete it to leave it out of the card")
        for each in found if isinstance(found, list) else ():
            ours = isinstance(each, dict) and {"policy", "prompts", "scores", "against_first", "metrics"} <= each.keys()
            if ours and Path(each["policy"]).absolute() == folder.absolute():
                first = found[0]["policy"] if each is not found[0] else ""
                rows = [(name, cells[0]) for name, cells in comparison.rows([each])]
                yield file.name, first, len(each["prompts"]), rows


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


def convert(target: Path, kind: str, llama_cpp: Path) -> None:
    """Write <target>/<name>-<kind>.gguf with the script of llama.cpp.

    Raises:
        PosttrainError: the script fails, for example because it does not know the architecture.
    """
    file = target / f"{target.name}-{kind}.gguf"
    command = [sys.executable, str(llama_cpp / CONVERT), str(target), "--outtype", kind, "--outfile", str(file)]
    say(f"converting: {shlex.join(command)}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not file.is_file():
        last = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise PosttrainError(f"{llama_cpp / CONVERT} wrote no {file}: {last}. {target} is exported but for that")
    say(f"converted: {file}")


def serving(target: Path) -> list[str]:
    """The commands that serve an exported policy; for Ollama with a Modelfile, where it can read the model."""
    from transformers import AutoConfig

    folder, name = shlex.quote(str(target)), shlex.quote(target.absolute().name.lower())
    lines = [f"transformers serve {folder}", f"vllm serve {folder}"]
    files = sorted(target.glob("*.gguf"))
    if not files and not set(AutoConfig.from_pretrained(target).architectures or ()) & set(OLLAMA):
        return [*lines, "(Ollama reads this architecture as GGUF only: to_gguf=q8_0 llama_cpp=<folder of llama.cpp>)"]
    (target / "Modelfile").write_text(f"FROM ./{files[0].name if files else ''}\n", encoding="utf-8")
    lines.append(f"ollama create {name} -f {shlex.quote(str(target / 'Modelfile'))} && ollama run {name}")
    # Ollama has a list of templates that it knows, and sends the bare prompt where the model's is none of them
    return [*lines, f"ollama show --template {name}  (must format prompts as {target / 'chat_template.jinja'} does)"]


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

    encoder = ChatEncoder(AutoTokenizer.from_pretrained(folder / "model"))
    card = model_card(folder, manifest, options.get("license"), encoder)
    if "to" in options:
        target = Path(options["to"])
        shutil.copytree(folder / "model", target)
        (target / CARD).write_text(card, encoding="utf-8")
        shutil.copyfile(folder / MANIFEST, target / MANIFEST)
        modes_by_umask(target)
        if "to_gguf" in options:
            convert(target, options["to_gguf"], Path(options["llama_cpp"]))
        if not STAGES[manifest["stage"]].is_classifier:
            say("\n  ".join(["serve it:", *serving(target)]))
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
