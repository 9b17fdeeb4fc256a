"""Prepared data: the encoded rows of a stage as an Arrow data set on disk, made once and memory-mapped from then on.

<output_dir>/.cache/ (or data.cache_dir)
  posttrain-hashes.json  sha256 of the sources, remembered
  <key>/rows.arrow       the rows that are kept, as `data/encode.py` makes them, and where each stands
  <key>/of-train.arrow   the numbers of those to train on; of-test.arrow and others: of those held out
  <key>/prepared.json    what else is known of them; without it, or with a file changed, the folder is made again
"""

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from posttrain.console import say
from posttrain.data.division import Numbers
from posttrain.data.encode import KEPT
from posttrain.data.hashes import HASHES, Hashes
from posttrain.data.reading import OPTIONAL, Work, read, rows_at, table_schema
from posttrain.data.splits import Counts
from posttrain.errors import ConfigError, DataError
from posttrain.values import JsonObject

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PREPARED = "prepared.json"
ROWS = "rows.arrow"
MAKING = ".making-"  # a folder that is not whole yet begins so
SLOW = 5.0  # seconds of preparation from which on it is told
# keys that change how the rows are prepared, and not what they are
FREE_KEYS = ("num_proc", "cache_dir", "max_eval_rows", "ptx")


def column_of(dataset: "Dataset", name: str) -> Numbers:
    """A column of numbers as an array; `dataset[name]` would make two kilobytes of Python objects for each row."""
    whole: Numbers = dataset.data.column(name).to_numpy()
    chosen = dataset._indices  # of a data set of some rows of its table
    return whole if chosen is None else whole[chosen.column(0).to_numpy()]


@dataclass
class Encoded:
    """One part ready to train on, and what it holds."""

    dataset: "Dataset"  # memory-mapped: the columns of the stage's encoding, and `length`
    work: Work[Any]  # that reads the rows again
    tokens: int
    loss_tokens: int  # tokens of responses
    without_end: int  # rows with a response that lost the token that ends its turn, because it was cut

    @property
    def lengths(self) -> Numbers:
        """Tokens of each row after the cut; of a pair those of its longer conversation."""
        return column_of(self.dataset, "length")

    def examples(self, numbers: Sequence[int]) -> list[Any]:
        """Some of the rows, read again from their sources."""
        some = self.dataset.select(numbers)
        places = list(zip(some["source"][:], some["number"][:], strict=True))
        return rows_at(self.work, places, some["order"][:])

    def bounded(self, rows: int | None) -> "Encoded":
        """No more than so many of its rows, chosen by their content; what it holds is told of all of them."""
        if rows is None or len(self.dataset) <= rows:
            return self
        first = np.argpartition(column_of(self.dataset, "order"), rows)[:rows]
        return replace(self, dataset=self.dataset.select(np.sort(first)))

    @cached_property
    def rows(self) -> list[Any]:
        """All of them, read again: of a part of no more than data.max_eval_rows."""
        return self.examples(range(len(self.dataset)))


@dataclass
class Prepared:
    """The rows of a stage, encoded, and what was found in them."""

    train: Encoded | None  # None where all rows are left out
    test: Encoded | None
    named: dict[str, Encoded]  # the sets of data.eval
    counts: dict[str, Counts]
    notes: list[str]
    rows_of: dict[str, dict[str, int]]  # source -> part -> readable rows
    fingerprint: dict[str, str]  # part -> sha256 of the content of its rows, in order
    columns: list[str]  # that rows have besides the documented ones
    options: list[str]  # chat_template_kwargs of single rows
    unlike_generation: int
    ptx: Encoded | None = None  # instruction rows that are learned beside (data.ptx)

    def add_ptx(self, rows: "Prepared") -> None:
        """Take over the rows of data.ptx, and what is known of them."""
        self.ptx, self.counts["ptx"], self.fingerprint["ptx"] = (
            rows.train,
            rows.counts["train"],
            rows.fingerprint["train"],
        )
        self.notes += [f"data.ptx: {note}" for note in rows.notes]
        for name in {**self.rows_of, **rows.rows_of}:
            mine = self.rows_of.setdefault(name, dict.fromkeys(next(iter(self.rows_of.values())), 0))
            mine["ptx"] = rows.rows_of.get(name, {}).get("train", 0)


def key_of(work: Work[Any], sources: dict[str, str]) -> str:
    """A name made of all that prepared rows depend on: sources, configuration, tokenizer, templates and code."""
    tokenizer = work.encoder.tokenizer
    code = hashlib.sha256()
    own = {inspect.getsourcefile(work.format), inspect.getsourcefile(type(work.encoding))}
    for file in sorted({*Path(__file__).parent.glob("*.py"), *(Path(str(name)) for name in own)}):
        code.update(file.read_bytes())
    parts = {
        "sources": sources,
        "names": [source.name for source in work.sources],
        "data": {name: value for name, value in asdict(work.data).items() if name not in FREE_KEYS},
        "encoding": repr(work.encoding),
        "tokenizer": _tokenizer_hash(tokenizer),
        "templates": [str(tokenizer.chat_template), work.encoder.training],
        "code": code.hexdigest(),
        "versions": {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "trl")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    state = json.dumps([type(tokenizer).__name__, whole, tokenizer.special_tokens_map, tokenizer.all_special_tokens])
    return hashlib.sha256(state.encode()).hexdigest()


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigError(
            f"the prepared rows cannot be kept in {folder}: {error.strerror or error}; name another folder with "
            "data.cache_dir=…"
        ) from error


def prepare(work: Work[Any], folder: Path, hashes: Hashes, key: str, sources: dict[str, str]) -> None:
    """Make the prepared rows unless they are there; of several commands that want the same, one makes them.

    Raises:
        DataError, ConfigError: as `reading.read`; a source has changed meanwhile; or the folder cannot be written.
    """
    target, making, lock = folder / key, folder / f"{MAKING}{key}", folder / f".{key}.lock"
    if is_whole(target, hashes):
        return
    was_there = folder.is_dir()
    try:
        with _writable(folder), FileLock(lock):
            if not is_whole(target, hashes):
                started = time.monotonic()
                for broken in (target, making):
                    shutil.rmtree(broken, ignore_errors=True)
                making.mkdir()
                made = _make(work, making, hashes, key)
                for name, digest in hashes.of_sources(work.sources).items():
                    if digest != sources[name]:
                        raise DataError(f"{name} has changed while it was read; start the same command again")
                making.rename(target)
                if (seconds := time.monotonic() - started) > SLOW:
                    say(f"data: {made:,} rows prepared in {seconds:,.0f} s and kept in {target}")
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        if not was_there:  # leave the disk as it was
            with contextlib.suppress(OSError):
                lock.unlink(missing_ok=True)
                folder.rmdir()
                folder.parent.rmdir()
        raise


def _make(work: Work[Any], folder: Path, hashes: Hashes, key: str) -> int:
    import pyarrow

    with pyarrow.OSFile(str(folder / ROWS), "wb") as file:
        schema = table_schema(work.encoding.types)
        with pyarrow.ipc.new_stream(file, schema) as rows:
            found = read(work, work.data.num_proc, rows.write_batch)
    kept = found.facts["why"] == KEPT
    row_numbers = np.cumsum(kept) - 1
    content: JsonObject = {"key": key, "parts": {}, "rows_of": {}}
    for part, numbers in found.parts.items():
        mine = numbers[kept[numbers]]
        index = pyarrow.table({"indices": pyarrow.array(row_numbers[mine], type=pyarrow.uint64())})
        with (
            pyarrow.OSFile(str(folder / f"of-{part}.arrow"), "wb") as file,
            pyarrow.ipc.new_stream(file, index.schema) as indices,
        ):
            indices.write_table(index)
        facts = found.facts[mine]
        content["parts"][part] = {
            "rows": len(mine),
            "tokens": int(facts["tokens"].sum(dtype="i8")),
            "loss_tokens": int(facts["loss_tokens"].sum(dtype="i8")),
            "without_end": int(facts["loses_end"].sum()),
            "optional": bool(facts["is_optional"].any()),
            "fingerprint": hashlib.sha256(found.facts["content"][numbers].tobytes()).hexdigest(),
            "counts": asdict(found.counts[part]),
        }
        for number, source in enumerate(work.sources):
            rows_of = content["rows_of"].setdefault(source.name, dict.fromkeys(found.parts, 0))
            rows_of[part] += int((found.facts["source"][numbers] == number).sum())
    content |= {
        "notes": found.notes,
        "columns": sorted(found.tally.columns),
        "options": sorted(found.tally.options),
        "unlike_generation": found.tally.unlike_generation,
    }
    content["files"] = {file.name: hashes.of(file) for file in sorted(folder.iterdir())}
    (folder / PREPARED).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return len(found.facts)


def _content(folder: Path) -> JsonObject | None:
    """What prepared.json says, if it is that of the folder."""
    try:
        found = json.loads((folder / PREPARED).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it was never finished, or it is broken: it is made again
        return None
    known = {"key", "parts", "rows_of", "notes", "columns", "options", "unlike_generation", "files"}
    return found if isinstance(found, dict) and found.keys() == known and found["key"] == folder.name else None


def is_whole(folder: Path, hashes: Hashes) -> bool:
    """Whether prepared rows are there, as they were written."""
    content = _content(folder)
    try:
        return content is not None and all(hashes.of(folder / name) == sha for name, sha in content["files"].items())
    except DataError:  # a file of it is missing
        return False


def prune(folder: Path) -> tuple[int, int]:
    """Delete prepared rows, finished or not, and nothing else; returns how many sets there were, and their bytes.

    Those that are being made stay.
    """
    count, size = 0, 0
    if not folder.is_dir():
        return 0, 0
    for path in sorted(folder.iterdir()):
        key = path.name.removeprefix(MAKING)
        ours = not path.is_symlink() and path.is_dir() and re.fullmatch(r"[0-9a-f]{32}", key)
        if not ours or (key == path.name and _content(path) is None):
            continue
        with contextlib.suppress(Timeout), FileLock(lock := folder / f".{key}.lock", timeout=0):
            size += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            count += 1
            shutil.rmtree(path)
            lock.unlink(missing_ok=True)
    (folder / HASHES).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else is in it
        folder.rmdir()
    return count, size


def load(work: Work[Any], folder: Path, key: str) -> Prepared:
    """Prepared rows, memory-mapped.

    Raises:
        ConfigError: they are not there: another machine has made them, and the folder is not shared with it.
    """
    from datasets import Dataset

    content = _content(folder / key)
    if content is None:
        raise ConfigError(
            f"no prepared rows in {folder / key}; name a folder that all machines share, data.cache_dir=…"
        )
    rows = str(folder / key / ROWS)
    encoded = {}
    for part, known in content["parts"].items():
        if known["rows"]:
            dataset = Dataset.from_file(rows, indices_filename=str(folder / key / f"of-{part}.arrow"))
            if OPTIONAL in dataset.column_names and not known["optional"]:
                dataset = dataset.remove_columns(OPTIONAL)
            encoded[part] = Encoded(dataset, work, known["tokens"], known["loss_tokens"], known["without_end"])
    return Prepared(
        encoded.pop("train", None),
        encoded.pop("test", None),
        encoded,
        {part: Counts(**known["counts"]) for part, known in content["parts"].items()},
        content["notes"],
        content["rows_of"],
        {part: known["fingerprint"] for part, known in content["parts"].items()},
        content["columns"],
        content["options"],
        content["unlike_generation"],
    )
