"""Rows as they stand in files, folders and Hub data sets, each with its place; no type is inferred."""

import csv
import glob
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from posttrain.config.schema import DataConfig, SourceConfig
from posttrain.config.suggest import nearest
from posttrain.errors import ConfigError, DataError
from posttrain.values import JsonObject

if TYPE_CHECKING:
    from datasets import Dataset

FILE_TYPES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
HELD_OUT_NAMES = ("test", "validation")
NAMED = "eval."  # the split of a held-out set of data.eval begins so
SHOWN_PROBLEMS = 5


class Problems:
    """Collects what is wrong with rows, so that the first few are printed together."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0
        self._said: set[str] = set()

    def add(self, where: str, what: str) -> None:
        """Count it; what has been said of an earlier row is not repeated."""
        self.count += 1
        if len(self.lines) < SHOWN_PROBLEMS and what not in self._said:
            self.lines.append(f"{where}: {what}")
            self._said.add(what)

    def summary(self) -> list[str]:
        """The first ones, and how many more there are."""
        more = self.count - len(self.lines)
        return [*self.lines, *([f"... and {more} more rows"] if more else [])]

    def merge(self, later: "Problems") -> None:
        """Add those of rows that come after."""
        for line in later.lines:
            where, _, what = line.partition(": ")
            self.add(where, what)
        self.count += later.count - len(later.lines)

    def raise_if_any(self) -> None:
        if self.lines:
            raise DataError(*self.summary())


class Source(NamedTuple):
    """A file, or a split of a data set."""

    name: str  # its path, or its Hub id and split
    split: str  # the part that its rows belong to, where they do not say so themselves
    unit: str  # what it has: lines, items or rows
    content: "Path | Dataset"
    data: DataConfig  # how it is read
    entry: int = 0  # of data.mixture
    keeps_split: bool = False  # whatever its rows say
    is_given: bool = False  # by a Python caller

    def place(self, number: int) -> str:
        """Where a row stands, the first being number 1."""
        return f"{self.name} {self.unit} {number}"


Numbered = tuple[int, object]  # the number of a row, and what stands there: of a .jsonl file the bytes of the line
Given = Mapping[str, "Dataset"]  # split -> data sets that a Python caller brings in place of data.dataset_name
NOTHING_GIVEN: Given = {}
TRAIN, EVAL = "train_dataset", "eval_dataset"


def _unique_keys(pairs: list[tuple[str, object]]) -> JsonObject:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key {twice!r}")
    return row


def parse_line(number: int, line: bytes) -> object:
    """What a line of a .jsonl file says.

    Raises:
        ValueError: it is not JSON, not UTF-8, or has a key twice.
    """
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        return json.loads(text.rstrip("\r\n"), object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON ({error.msg} at column {error.colno})") from error
    except ValueError as error:  # not UTF-8, or a duplicate key
        raise ValueError(f"invalid JSON ({error})") from error


def _read_jsonl(path: Path, problems: Problems) -> Iterator[Numbered]:
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield number, line


def _is_json_lines(path: Path) -> bool:
    """Whether the first of several lines is an object of its own."""
    with path.open("rb") as lines:
        filled = (line for line in lines if line.strip(b"\xef\xbb\xbf \t\r\n"))
        first = next(filled, b"").lstrip(b"\xef\xbb\xbf \t")
        try:
            return first.startswith(b"{") and isinstance(json.loads(first), dict) and next(filled, None) is not None
        except ValueError:
            return False


def _read_json(path: Path, problems: Problems) -> Iterator[Numbered]:
    if _is_json_lines(path):
        yield from _read_jsonl(path, problems)
        return
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except ValueError as error:
        problems.add(str(path), f"invalid JSON ({error})")
        return
    if not isinstance(rows, list):
        problems.add(str(path), "must hold a list of objects; one object a line belongs in a .jsonl file")
        return
    yield from enumerate(rows, start=1)


def _read_csv(path: Path, problems: Problems) -> Iterator[Numbered]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            names = list(reader.fieldnames or ())
            if twice := [name for name in names if names.count(name) > 1]:
                problems.add(f"{path} line 1", f"two columns are called {twice[0]!r}")
                return
            for row in reader:
                if None in row or None in row.values():
                    what = f"has not as many fields as the header ({len(reader.fieldnames or ())})"
                    problems.add(f"{path} line {reader.line_num}", what)
                else:  # where it begins
                    yield reader.line_num - sum(field.count("\n") for field in row.values()), row
        except (csv.Error, UnicodeDecodeError) as error:
            problems.add(f"{path} line {reader.line_num}", f"invalid CSV ({error})")


def _read_parquet(path: Path, problems: Problems) -> Iterator[Numbered]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        problems.add(str(path), f"invalid Parquet ({str(error).splitlines()[0]})")


_READERS: dict[str, Callable[[Path, Problems], Iterator[Numbered]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _type(name: str | Path) -> str:
    """Its ending, as FILE_TYPES has it."""
    path = Path(str(name).lower())
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def _files(name: str) -> list[Path]:
    """The files that a path or pattern names; none where it is not a local name."""
    if Path(name).is_file():
        return [Path(name)]
    return sorted(Path(found) for found in glob.glob(name) if Path(found).is_file())  # noqa: PTH207, it takes absolute patterns


def _names(data: DataConfig) -> list[str]:
    return [data.dataset_name] if isinstance(data.dataset_name, str) else list(data.dataset_name)


def _sources(data: DataConfig) -> list[str]:
    """The names of all sources but a file of data.dataset_test_split."""
    return [*_names(data), *(part.name for part in (*data.eval.values(), *data.ptx))]


def is_local_data(data: DataConfig) -> bool:
    """Whether every source is a file or folder here."""
    return all(_files(name) or Path(name).is_dir() for name in _sources(data))


def data_files(data: DataConfig) -> set[str]:
    """The absolute paths of all local files that would be read, as the manifest records them."""
    names = [*_sources(data), *([data.dataset_test_split] if data.dataset_test_split is not None else [])]
    return {str(path.resolve()) for name in names for path in _files(name)}


def check_given(named: Mapping[str, "Dataset | None"]) -> Given:
    """The data sets that a Python caller brings, if they are some.

    Raises:
        ConfigError: one is of another type or empty, or rows to hold out come without rows to train on.
    """
    given = {name: rows for name, rows in named.items() if rows is not None}
    if given:
        from datasets import Dataset

        for name, rows in given.items():
            if not isinstance(rows, Dataset):
                raise ConfigError(f"{name} must be a datasets.Dataset, got {type(rows).__name__}")
            if not len(rows):
                raise ConfigError(f"{name} has no rows")
        if TRAIN not in given:
            raise ConfigError(f"{EVAL} needs {TRAIN} beside it; or name both with data.*")
    return given


def check_source(data: DataConfig) -> None:
    """Refuse a source that cannot exist, before anything slow is done.

    Raises:
        ConfigError: no such file, or files of a type that is not read.
    """
    names = [(f"{key}.name" if "[" in key else key, part.name) for key, part in data.parts().items()]
    names += [("data.dataset_name", name) for name in _names(data)] if not data.mixture else []
    for key, name in names:
        found = _files(name)
        looks_local = name.startswith((".", "/", "~")) or _type(name) in FILE_TYPES or name.count("/") > 1
        if not found and not Path(name).is_dir() and (looks_local or "*" in name):
            beside = map(str, Path(name).parent.glob("*.*"))
            raise ConfigError(f"{key}={name}: no such file{nearest(name, beside)}")
        for path in found:
            if _type(path) not in _READERS:
                known = ", ".join(FILE_TYPES)
                raise ConfigError(f"{key}={path}: the type {_type(path)!r} is not one of {known}")


def _unit(path: Path) -> str:
    if _type(path) == ".json":
        return "line" if _is_json_lines(path) else "item"
    return "row" if _type(path) == ".parquet" else "line"


def read_source(source: Source, problems: Problems) -> Iterator[Numbered]:
    """Its rows in order, and what is wrong with those that cannot be told apart.

    Raises:
        DataError: the file cannot be read at all.
    """
    path = source.content
    if not isinstance(path, Path):
        yield from enumerate(path, start=1)
        return
    try:
        yield from _READERS[_type(path)](path, problems)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: invalid gzip ({error})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; check its permissions") from error


def read_again(source: Source, numbers: Collection[int]) -> Iterator[Numbered]:
    """Those of its rows that have one of the numbers."""
    if not isinstance(source.content, Path):
        yield from ((number, source.content[number - 1]) for number in sorted(numbers))
        return
    last = max(numbers)
    for number, content in read_source(source, Problems()):
        if number in numbers:
            yield number, content
        if number >= last:
            return


def _folder_or_hub(data: DataConfig, name: str) -> list[Source]:
    """Splits of a folder saved by `datasets` or of a data set on the Hub."""
    import datasets

    folder = Path(name)
    if folder.is_dir():
        if not (folder / "dataset_dict.json").is_file() and not (folder / "state.json").is_file():
            raise ConfigError(
                f"data.dataset_name={name} is a folder that datasets.save_to_disk did not write; "
                f"name its files instead ({', '.join(FILE_TYPES)}; a pattern such as '{name}/*.jsonl' will do)"
            )
        saved = datasets.load_from_disk(name)
        splits = saved if isinstance(saved, datasets.DatasetDict) else {data.dataset_train_split: saved}
    else:
        try:
            wanted = [split for split in (data.dataset_test_split, *HELD_OUT_NAMES) if split]
            available = datasets.get_dataset_split_names(name, data.dataset_config)
            chosen = [data.dataset_train_split, *(split for split in wanted if split in available)]
            splits = {split: datasets.load_dataset(name, data.dataset_config, split=split) for split in chosen}
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"data.dataset_name={name} is neither a file here nor a data set that could be loaded from the Hub "
                f"({type(error).__name__}: {str(error).splitlines()[0]})"
            ) from error
    if data.dataset_train_split not in splits:
        raise ConfigError(
            f"data.dataset_train_split={data.dataset_train_split} is not a split of {name}; it has {', '.join(splits)}"
        )
    used = (data.dataset_train_split, data.dataset_test_split, *HELD_OUT_NAMES)
    return [Source(f"{name}[{split}]", split, "row", rows, data) for split, rows in splits.items() if split in used]


def _files_as(data: DataConfig, name: str, split: str) -> list[Source]:
    return [Source(str(path), split, _unit(path), path, data) for path in _files(name)]


def _part(data: DataConfig, part: SourceConfig, split: str) -> list[Source]:
    """One of several sources, read as the rows of a split."""
    own = replace(
        data,
        dataset_name=part.name,
        dataset_config=part.config if part.config is not None else data.dataset_config,
        dataset_train_split=part.split if part.split is not None else data.dataset_train_split,
        dataset_test_split=None,
        max_rows=part.max_rows if part.max_rows is not None else data.max_rows,
        columns=replace(data.columns, **part.columns),
    )
    if part.split is not None and _files(part.name):
        raise ConfigError(f"{part.name} is a file and has no split {part.split!r}; leave `split` out of its entry")
    found = _files_as(own, part.name, split) or [
        source._replace(split=split)
        for source in _folder_or_hub(own, part.name)
        if source.split == own.dataset_train_split
    ]
    if not found:
        raise ConfigError(f"{part.name} has no split {own.dataset_train_split}")
    return found


def find_sources(data: DataConfig, given: Given = NOTHING_GIVEN) -> list[Source]:
    """What `data` names, those with rows to train on first; files have one split, whose rows may say theirs in `split`.

    Raises:
        ConfigError: something is not there, or of a type that is not read.
    """
    if given:
        return [
            Source(split, split, "row", rows, data, keeps_split=True, is_given=True) for split, rows in given.items()
        ]
    check_source(data)
    found: list[Source] = []
    for entry, part in enumerate(data.mixture):
        found += [source._replace(entry=entry) for source in _part(data, part, data.dataset_train_split)]
    if not data.mixture:
        for name in _names(data):
            found += _files_as(data, name, data.dataset_train_split) or _folder_or_hub(data, name)
    if data.dataset_test_split:
        found += _files_as(data, data.dataset_test_split, data.dataset_test_split)
    for name, part in data.eval.items():
        found += [source._replace(keeps_split=True) for source in _part(data, part, f"{NAMED}{name}")]
    return sorted(found, key=lambda source: source.split != data.dataset_train_split)
