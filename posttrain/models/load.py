"""Tokenizers and models, loaded strictly: missing, newly initialised or unexpected weights are errors."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from posttrain.config.schema import Config, ModelConfig
from posttrain.console import warn
from posttrain.data.chat import ChatEncoder
from posttrain.data.template import plain_template
from posttrain.devices import process_state
from posttrain.errors import ConfigError, PosttrainError
from posttrain.models.resolve import adapter_base, beside, naming, resolve_path
from posttrain.paths import EMBEDDED
from posttrain.runs.checkpoint import modes_by_umask, writing
from posttrain.runs.sharding import outside_zero_init
from posttrain.values import JsonObject

if TYPE_CHECKING:
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        GenerationConfig,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

PAD_CANDIDATES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|vision_pad|>", "<|endoftext|>")
NEW_PAD = "<|pad|>"
# Fields of a config that put chance into a forward pass in training: dropout of any kind, and noise at a router.
_RANDOM = re.compile("drop|jitter")
# Generation settings that say how completions are generated; the others refine it.
_MODES = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate")
# Weights that a model has no place for and does without, besides those that its class in transformers names itself.
_SUPERFLUOUS = {r"\.masked_bias$": "a constant of the causal mask, which old releases stored"}
_REPLACED = {r"^(lm_head|embed_out)\.": "the head that predicts tokens, in whose place a reward model has its own"}
# Texts on which a tokenizer as loaded must agree with its own tokenizer.json.
_PROBES = ("It has 13 legs, or 1300.", "\n\n  def f(x):\n\treturn x", "naïve café — 東京 🙂", " The end.")


@contextlib.contextmanager
def _named_failure(model: ModelConfig, what: str) -> Iterator[None]:
    """Turn what the libraries raise over a model that they cannot load into one line that names it."""
    try:
        yield
    except PosttrainError:
        raise
    except Exception as error:  # safetensors and tokenizers raise their own kinds, bare Exception among them
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"model.model_name_or_path={model.start}: {what}: {reason}") from error


class Load(Protocol):
    """Load the model of a stage from `path`."""

    def __call__(
        self, config: Config, tokenizer: "PreTrainedTokenizerBase", path: str, quantised: bool = True
    ) -> "PreTrainedModel": ...


def load_tokenizer(model: ModelConfig) -> tuple["PreTrainedTokenizerBase", list[str]]:
    """The tokenizer with a chat template and a pad token of its own, and what was decided about them.

    Raises:
        ConfigError: it cannot be loaded, has no EOS token, or its chat template is locked by an earlier stage.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import cached_file, logging

    logging.disable_progress_bar()  # of loading what is on disk; downloads have one of their own
    folder = resolve_path(model)
    known: JsonObject = {"revision": model.model_revision, "trust_remote_code": model.trust_remote_code}
    notes = []
    with _named_failure(model, "its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **known)
        file = cached_file(folder, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **known)
        if file is not None and not _agrees_with(tokenizer, file):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **known)
            notes.append("tokenizer: AutoTokenizer splits text otherwise than tokenizer.json; tokenizer.json is used")
            if not _agrees_with(tokenizer, file):
                raise ConfigError(
                    f"model.model_name_or_path={model.start}: "
                    "transformers splits text otherwise than the model's tokenizer.json"
                )
    if not tokenizer(_PROBES[0], add_special_tokens=False).input_ids:
        # transformers 5 makes up a tokenizer without a vocabulary where a folder holds none
        raise ConfigError(f"model.model_name_or_path={model.start}: it has no tokenizer (no tokenizer.json)")
    if tokenizer.eos_token is None and tokenizer.sep_token is not None:  # an encoder's, such as BERT's
        tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
        notes.append(f"EOS token: {tokenizer.eos_token}, the separator (the tokenizer has no other)")
    if tokenizer.eos_token is None:
        raise ConfigError(f"model.model_name_or_path={model.start}: the tokenizer has no EOS token")
    notes += _ensure_chat_template(tokenizer, model)
    notes += _ensure_pad_token(tokenizer)
    return tokenizer, notes + _notes_of_weights(model, len(tokenizer))


def _notes_of_weights(model: ModelConfig, tokens: int) -> list[str]:
    """What loading the model will change in it."""
    from transformers import GenerationConfig
    from transformers.utils import cached_file

    notes = []
    rows = hub_config(model).get_text_config().vocab_size
    if tokens > rows:
        notes.append(f"embeddings: {rows} grow to the tokenizer's {tokens}; a new one begins as the mean of the old")
    folder, name, known = _folder_of_weights(model), "generation_config.json", {"revision": model.model_revision}
    if cached_file(folder, name, _raise_exceptions_for_missing_entries=False, **known) is not None:
        with _named_failure(model, f"its {name} cannot be read"):
            _, without = _mend(GenerationConfig.from_pretrained(folder, **known))
        if without:
            notes.append(f"{name}: {', '.join(without)} left out, as transformers refuses to save them with the rest")
    return notes


def _mend(settings: "GenerationConfig") -> tuple["GenerationConfig", list[str]]:
    """Generation settings that transformers saves, and what was left out of them: all that contradicts the mode."""
    from transformers import GenerationConfig

    kept: JsonObject = {}
    without = []
    for name, value in sorted(settings.to_diff_dict().items(), key=lambda item: item[0] not in _MODES):
        try:
            GenerationConfig.from_dict(kept | {name: value}).validate(strict=True)
            kept[name] = value
        except ValueError:
            without.append(f"{name}={value}")
    return (GenerationConfig.from_dict(kept), without) if without else (settings, [])


def _agrees_with(tokenizer: "PreTrainedTokenizerBase", file: str) -> bool:
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(file)
    raw.no_truncation()
    raw.no_padding()
    return all(
        tokenizer(text, add_special_tokens=False).input_ids == raw.encode(text, add_special_tokens=False).ids
        for text in _PROBES
    )


def _ensure_chat_template(tokenizer: "PreTrainedTokenizerBase", model: ModelConfig) -> list[str]:
    if model.chat_template_path is None:
        if tokenizer.chat_template:
            return []
        tokenizer.chat_template = plain_template(tokenizer)
        return ["chat template: posttrain's plain text (the tokenizer brings none)"]
    if (Path(model.start) / "posttrain.json").is_file():
        raise ConfigError(
            f"model.chat_template_path={model.chat_template_path}: {model.start} was trained with the "
            "template saved beside it; another one would change what it has learned to read. Leave the key out"
        )
    try:
        tokenizer.chat_template = Path(model.chat_template_path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"model.chat_template_path={model.chat_template_path}: {error}") from error
    return [f"chat template: {model.chat_template_path}"]


def _ensure_pad_token(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """A pad token that is not EOS: whoever masks padding by id must not mask the EOS that ends a response."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return []
    vocabulary = tokenizer.get_vocab()
    for token in PAD_CANDIDATES:
        if token in vocabulary and token != tokenizer.eos_token:
            tokenizer.pad_token = token
            return [f"pad token: {token} (in the vocabulary; EOS is never used for padding)"]
    tokenizer.add_special_tokens({"pad_token": NEW_PAD})
    return [f"pad token: {NEW_PAD} (added; EOS is never used for padding)"]


def hub_config(model: ModelConfig, path: str | None = None) -> "PretrainedConfig":
    """The config.json at `path`, or else beside the model's weights.

    Raises:
        ConfigError: it cannot be read.
    """
    from transformers import AutoConfig

    folder = path or _folder_of_weights(model)
    with _named_failure(model, "its config.json cannot be read"):
        return AutoConfig.from_pretrained(
            folder, revision=model.model_revision, trust_remote_code=model.trust_remote_code
        )


def _folder_of_weights(model: ModelConfig) -> str:
    """The folder or Hub id that holds them, an adapter's base model's for an adapter."""
    folder = resolve_path(model)
    return _adapter_base(model, folder) if (Path(folder) / "adapter_config.json").is_file() else folder


def max_positions(model: ModelConfig) -> int | None:
    """How many positions the model has; None where its config names no limit."""
    found = hub_config(model).get_text_config().to_dict()
    limits = [found[name] for name in ("n_positions", "max_position_embeddings") if isinstance(found.get(name), int)]
    return min(limits) if limits else None


def _adapter_base(model: ModelConfig, folder: str) -> str:
    """The folder or Hub id of the model that the adapter in `folder` was trained on.

    Raises:
        ConfigError: it is not there, or adapter_config.json does not name it.
    """
    with naming(f"{folder}/adapter_config.json: base_model_name_or_path"):
        return resolve_path(beside(model, adapter_base(Path(folder))))


def _merge_adapter(model: ModelConfig, tokenizer: "PreTrainedTokenizerBase", folder: str) -> "PreTrainedModel":
    """An adapter merged with its base model, every weight of both there.

    Raises:
        ConfigError: as `load_causal_lm` of either; peft alone would take a missing weight for an untrained one.
    """
    from peft import PeftConfig, get_peft_model

    where = f"model.model_name_or_path={folder}"
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise ConfigError(f"{where}: no adapter_model.safetensors; other files of weights are not read")
    path = _adapter_base(model, folder)
    with naming(f"{folder}/adapter_config.json: base_model_name_or_path"):
        base = load_causal_lm(beside(model, path), tokenizer, path, dropout=True)
    with _named_failure(model, "its adapter cannot be loaded"):
        adapted = get_peft_model(base, PeftConfig.from_pretrained(folder))
        report = adapted.load_adapter(folder, "default")
    found = {"missing": report.missing_keys, "unexpected": report.unexpected_keys}
    told = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in found.items() if names]
    if told:
        raise ConfigError(f"{where}: keys in the adapter's weights are {', '.join(told)}; it is another model's")
    return adapted.merge_and_unload()


@outside_zero_init()
def prepare_base(model: ModelConfig, tokenizer: "PreTrainedTokenizerBase", folder: Path) -> str:
    """The path of complete weights to start from.

    A model drawn at random and an adapter given as the model are written to `folder` first: every later step
    (quantisation, a reference read from disk, a merge) then starts from the same plain files.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    name = resolve_path(model)
    adapter = (Path(name) / "adapter_config.json").is_file()
    if not adapter and not model.from_scratch and model.start != EMBEDDED:
        return name
    state = process_state()
    if state.is_main_process:
        with _named_failure(model, "it cannot be built"):
            if adapter:
                built = _merge_adapter(model, tokenizer, name)
            else:
                set_seed(0)  # one and the same base model, whatever the seed of the run
                config = AutoConfig.from_pretrained(
                    name, revision=model.model_revision, trust_remote_code=model.trust_remote_code
                )
                built = AutoModelForCausalLM.from_config(config)
        with writing(folder):
            built.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            modes_by_umask(folder)
    state.wait_for_everyone()
    return str(folder)


def _classifiers(config: "PretrainedConfig") -> list[str]:
    return [name for name in config.architectures or () if "ForSequenceClassification" in name]


def refuse_reward_model(model: ModelConfig, config: "PretrainedConfig") -> None:
    """Raises ConfigError where a language model is wanted, and the config is that of a model that gives a score."""
    if kinds := _classifiers(config):
        raise ConfigError(
            f"model.model_name_or_path={model.start} is a reward model ({kinds[0]}), which gives a score and writes "
            "nothing; name a language model"
        )


def load_causal_lm(
    model: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    path: str,
    quantised: bool = True,
    dropout: bool = False,
) -> "PreTrainedModel":
    """A causal language model with every weight there and finite, and as many embeddings as the tokenizer needs.

    Its config has all dropout at 0, but with `dropout`, which leaves it as it is.

    Raises:
        ConfigError: weights are missing, unexpected, of another shape, not finite or no safetensors; or the model reads
            in both directions.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForCausalLM

    config = hub_config(model, path)
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.to_dict().get("is_decoder"):
        raise ConfigError(
            f"model.model_name_or_path={model.start}: {config.model_type} is an encoder, reads in both directions and "
            "writes no completions; it can be a reward model only"
        )
    refuse_reward_model(model, config)
    if not dropout:
        _switch_dropout_off(config)
    loaded = _load(AutoModelForCausalLM, model, tokenizer, path, config, quantised)
    loaded.generation_config, _ = _mend(loaded.generation_config)
    _agree_on_special_tokens(loaded, tokenizer)
    _say_what_is_tied(loaded, path)
    return loaded


def load_reward_model(
    model: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    path: str,
    seed: int,
    quantised: bool = True,
    new_head: bool = True,
) -> "PreTrainedModel":
    """A sequence-classification model with one output, its head new (drawn with `seed`) or as it was saved.

    Raises:
        ConfigError: as `load_causal_lm`, but that with `new_head` the head may be missing; it has more than one output,
            or transformers has no such model of this architecture.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification, set_seed

    config = hub_config(model, path)
    where = f"model.model_name_or_path={model.start}"
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not model.trust_remote_code:
        raise ConfigError(
            f"{where}: transformers has no reward model (sequence classifier) of the architecture {config.model_type}; "
            "take another model for it, as stage.reward_model may have a tokenizer of its own"
        )
    if (not new_head or _classifiers(config)) and config.num_labels != 1:
        raise ConfigError(
            f"{where}: it has {config.num_labels} outputs, one is needed: the reward. Train one with stage=reward, or "
            "save its model with num_labels=1"
        )
    config.num_labels = 1
    _switch_dropout_off(config)
    set_seed(seed)
    loaded = _load(AutoModelForSequenceClassification, model, tokenizer, path, config, quantised, new_head)
    # the score is read at the last token that is not padding, so padding has to be known by its id
    loaded.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return loaded


def _load(
    auto_class: "type[AutoModelForCausalLM | AutoModelForSequenceClassification]",
    model: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    path: str,
    config: "PretrainedConfig",
    quantised: bool,
    new_head: bool = False,
) -> "PreTrainedModel":
    import torch
    from transformers import BitsAndBytesConfig

    options: JsonObject = {}
    if quantised and (model.load_in_4bit or model.load_in_8bit):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=model.load_in_4bit,
            load_in_8bit=model.load_in_8bit,
            bnb_4bit_compute_dtype=None if model.dtype == "auto" else model.dtype,
            bnb_4bit_quant_type=model.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=model.use_bnb_nested_quant,
        )
        # each process of a distributed run quantises onto its own device
        if torch.cuda.is_available():
            options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
        options["quantization_config"].llm_int8_skip_modules = ["lm_head", "score"]
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    if path == model.start:
        options["revision"] = model.model_revision
    if "output_router_logits" in (text := config.get_text_config()).to_dict():
        text.output_router_logits = False  # TRL asks for them where it needs them; generation fails over them
    with outside_zero_init(), _named_failure(model, "its weights cannot be loaded"):
        loaded, report = auto_class.from_pretrained(
            path,
            config=config,
            dtype=model.dtype,
            use_safetensors=True,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    superfluous = "|".join([*_SUPERFLUOUS, *(_REPLACED if new_head else [])])
    faults = {
        "missing": ({"score.weight"} if new_head else set(), "transformers would fill them with random numbers"),
        "mismatched": (set(), "transformers would fill them with random numbers"),
        "unexpected": (
            {name for name in report["unexpected_keys"] if re.search(superfluous, name)},
            "transformers would leave them out, and so give another model than the one that was trained; does "
            "config.json belong to these weights?",
        ),
    }
    for kind, (allowed, harm) in faults.items():
        names = sorted({str(name) for name in report[f"{kind}_keys"]} - allowed)
        if names:
            raise ConfigError(
                f"model.model_name_or_path={model.start}: {len(names)} {kind} keys in its "
                f"weights ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); {harm}"
            )
    for name, weight in loaded.named_parameters():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise ConfigError(f"model.model_name_or_path={model.start}: {name} holds NaN or infinity")
    _keep_quantised_layers_trainable(loaded)
    _fit_embeddings(loaded, len(tokenizer))
    return loaded


def _switch_dropout_off(config: "PretrainedConfig") -> None:
    """In the config, because a model may call dropout as a function, where no module can be switched off."""
    for part in (config, config.get_text_config()):
        numbers = {name: value for name, value in part.to_dict().items() if isinstance(value, float) and value > 0}
        part.update({name: 0.0 for name in numbers if _RANDOM.search(name)})


def _keep_quantised_layers_trainable(model: "PreTrainedModel") -> None:
    """On a CPU with AVX512-BF16, one evaluation repacks a 4-bit layer of bitsandbytes 0.50 for inference for good.

    Training after it then gets no gradient through the layer, or an error where the layer has a bias.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _fit_embeddings(model: "PreTrainedModel", size: int) -> None:
    """Grow the embeddings to `size` rows; a new row is the mean of the old ones, so that its token starts unlikely."""
    import torch

    old = model.get_input_embeddings().num_embeddings
    if size <= old:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                layer.weight[old:] = layer.weight[:old].mean(dim=0)


def _say_what_is_tied(model: "PreTrainedModel", path: str) -> None:
    """Have the config say that head and embeddings are apart where the file has them apart, as transformers reads it.

    What is saved would otherwise be tied by whoever believes its config.json.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    if head is not None and config.tie_word_embeddings and head.weight is not model.get_input_embeddings().weight:
        warn(f"{path}: config.json ties head and embeddings, and the weights have two that differ; they stay apart")
        config.tie_word_embeddings = model.config.tie_word_embeddings = False


def _agree_on_special_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """The model stops at EOS and at the token that ends a turn, and pads with the tokenizer's pad token."""
    end = ChatEncoder(tokenizer).end_id
    stops = model.generation_config.eos_token_id
    known = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    wanted = list(dict.fromkeys([end, tokenizer.eos_token_id, *known]))
    model.generation_config.eos_token_id = wanted if len(wanted) > 1 else wanted[0]
    for config in (model.config.get_text_config(), model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    model.config.get_text_config().bos_token_id = tokenizer.bos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id


def load_model_and_tokenizer(
    model: ModelConfig, folder: Path | None = None
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load both; `folder` takes the weights to train from where they have to be built first (see `prepare_base`)."""
    tokenizer, _ = load_tokenizer(model)
    if folder is None:
        return load_whole(model, tokenizer), tokenizer
    return load_causal_lm(model, tokenizer, prepare_base(model, tokenizer, folder), dropout=True), tokenizer


def load_whole(model: ModelConfig, tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
    """The model as it was saved, for what is not trained; an adapter merged with its base model.

    Raises:
        ConfigError: as `load_causal_lm`.
    """
    path = resolve_path(model)
    if (Path(path) / "adapter_config.json").is_file():
        with outside_zero_init():
            return _merge_adapter(model, tokenizer, path)
    return load_causal_lm(model, tokenizer, path, dropout=True)
