"""Rows read, checked and encoded a thousand at a time, by several processes where there are many; in order."""

import hashlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, groupby, islice
from typing import TYPE_CHECKING, Generic, NamedTuple

import numpy as np

from posttrain.config.schema import DataConfig
from posttrain.data.chat import ChatEncoder
from posttrain.data.division import FACTS, Facts, Numbers, count, divide
from posttrain.data.encode import BAD, KEPT, ColumnType, EncodedRow, Encoding, LeftOut, encode_rows
from posttrain.data.sources import (
    HELD_OUT_NAMES,
    NAMED,
    Problems,
    Source,
    read_again,
    read_source,
)
from posttrain.data.splits import Counts, Example, Reader, Row, Tally
from posttrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow

CHUNK = 1000  # rows
ALONE = 5  # chunks that one process reads before others are started
MOST_PROCESSES = 16
ECHO = 20  # characters of a prompt from which on a completion that begins with them is hardly a coincidence

Format = Callable[[DataConfig], Reader[Row]]
Chunk = Sequence[tuple[int, int, object]]  # (number of the source, number of the row, what stands there)


class Outcome(NamedTuple):
    """What became of a chunk."""

    tally: Tally
    splits: list[str]  # names of the splits that `facts` numbers
    facts: Facts  # of each readable row
    table: "pyarrow.RecordBatch | None"  # the rows that are kept


@dataclass
class Work(Generic[Row]):
    """Reads and encodes chunks."""

    data: DataConfig
    format: Format[Row]
    sources: Sequence[Source]
    encoder: ChatEncoder
    encoding: Encoding[Row]

    def __call__(self, chunk: Chunk) -> Outcome:
        tally, readers = Tally(), dict[int, Reader[Row]]()
        rows, splits, places = [], [], []
        for source, number, content in chunk:
            if source not in readers:
                readers[source] = self.format(self.sources[source].data)
            split, row = readers[source].row(self.sources[source], number, content)
            if row is not None:
                rows.append(row)
                splits.append(split)
                places.append((source, number))
        for reader in readers.values():
            tally.merge(reader.tally)
        names = list(dict.fromkeys(splits))
        facts = np.zeros(len(rows), dtype=FACTS)
        facts["content"] = [content_of(row) for row in rows]
        facts["split"] = [names.index(split) for split in splits]
        facts["repeats_prompt"] = [_repeats_prompt(row) for row in rows]
        if places:
            facts["source"], facts["number"] = np.array(places).T
        before = self.encoder.unlike_generation
        table = self._encode(rows, splits, facts, tally)
        tally.unlike_generation = self.encoder.unlike_generation - before
        return Outcome(tally, names, facts, table)

    def _encode(self, rows: list[Row], splits: list[str], facts: Facts, tally: Tally) -> "pyarrow.RecordBatch | None":
        """The table of the rows that are kept; what became of each goes into `facts` and `tally`."""
        import pyarrow

        used = {self.data.dataset_train_split, self.data.dataset_test_split, *HELD_OUT_NAMES}
        wanted = [number for number, split in enumerate(splits) if split in used or split.startswith(NAMED)]
        drops = self.data.bad_rows == "drop"
        facts["why"] = BAD
        kept: list[EncodedRow] = []
        found = encode_rows(self.encoder, [rows[number] for number in wanted], self.encoding)
        for number, made in zip(wanted, found, strict=True):
            if isinstance(made, LeftOut):
                facts["why"][number] = made.why
            elif isinstance(made, ValueError):
                (tally.dropped if drops else tally.unfit[splits[number]]).add(rows[number].where, str(made))
            else:
                kept.append(made)
                facts["why"][number] = KEPT
                facts["is_cut"][number], facts["loses_end"][number] = made.is_cut, made.loses_end
                facts["tokens"][number], facts["loss_tokens"][number] = made.tokens, made.loss_tokens
                facts["is_optional"][number] = made.columns.get(OPTIONAL) is not None
        if not kept:
            return None
        places = facts[facts["why"] == KEPT]
        contents = np.ascontiguousarray(places["content"]).view("V16").tolist()
        columns: dict[str, list[object]] = {
            name: [row.columns.get(name) for row in kept] for name in self.encoding.types
        }
        columns |= {"length": [row.length for row in kept], "order": [order_of(each) for each in contents]}
        columns |= {name: places[name] for name in ("source", "number")}
        fields = table_schema(self.encoding.types)
        return pyarrow.record_batch(
            [pyarrow.array(columns[field.name], type=field.type) for field in fields], schema=fields
        )


OPTIONAL = "margin"  # a column that all rows of a part have, or none


def table_schema(types: dict[str, ColumnType]) -> "pyarrow.Schema":
    """The columns of a prepared data set: those of the encoding, and where each row stands.

    `order` is a number made of the row's content, by which some of many rows are chosen.
    """
    import pyarrow

    kinds = {
        "ids": pyarrow.list_(pyarrow.int32()),
        "flag": pyarrow.bool_(),
        "integer": pyarrow.int32(),
        "number": pyarrow.float64(),
        "text": pyarrow.large_string(),
    }
    more = {"length": pyarrow.int32(), "order": pyarrow.int64(), "source": pyarrow.int16(), "number": pyarrow.int64()}
    return pyarrow.schema({name: kinds[kind] for name, kind in types.items()} | more)


def content_of(row: Example) -> bytes:
    """The beginning of the sha256 of what makes two rows the same row."""
    return hashlib.sha256(row.content.encode()).digest()[:16]


def order_of(content: bytes) -> int:
    """A number by which some of many rows are chosen."""
    return int.from_bytes(content[:8], "big", signed=True)


def _repeats_prompt(row: Example) -> bool:
    question = row.prompt[-1]["content"].strip() if row.prompt else ""
    return len(question) >= ECHO and row.reference.strip().startswith(question)


def _chunks(sources: Sequence[Source], problems: Problems, cut_short: list[str]) -> Iterator[Chunk]:
    def rows() -> Iterator[tuple[int, int, object]]:
        for (_, _), group in groupby(enumerate(sources), key=lambda each: (each[1].split, each[1].entry)):
            whole = list(group)
            limit = whole[0][1].data.max_rows
            found = chain.from_iterable(
                ((place, number, content) for number, content in read_source(source, problems))
                for place, source in whole
            )
            yield from islice(found, limit)
            if limit is not None and next(found, None) is not None:
                cut_short.append(f"{limit:,} of {whole[0][1].name}")

    found = rows()
    while chunk := list(islice(found, CHUNK)):
        yield chunk


_work: Callable[[Chunk], Outcome] | None = None


def _start(work: Callable[[Chunk], Outcome]) -> None:
    global _work
    _work = work


def _in_process(chunk: Chunk) -> Outcome:
    assert _work is not None
    return _work(chunk)


def _outcomes(work: Callable[[Chunk], Outcome], chunks: Iterable[Chunk], processes: int | None) -> Iterator[Outcome]:
    chunks = iter(chunks)
    if processes is None:
        yield from map(work, islice(chunks, ALONE))
        processes = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, MOST_PROCESSES)
    first = next(chunks, None)
    if first is None:
        return
    chunks = chain([first], chunks)
    if processes == 1:
        yield from map(work, chunks)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else each process would use all cores, and says so
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else None)
    pool = ProcessPoolExecutor(processes, context, _start, (work,))
    try:
        waiting: deque[Future[Outcome]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_in_process, chunk))
            if len(waiting) > 2 * processes:  # no more in memory than that
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass
class Found:
    """All that is known once every row has been read."""

    counts: dict[str, Counts]
    notes: list[str]
    facts: Facts
    parts: dict[str, Numbers]  # train, test and the sets of data.eval
    tally: Tally


def read(work: Work[Row], processes: int | None, keep: "Callable[[pyarrow.RecordBatch], None]") -> Found:
    """Read all rows, hand on what they are encoded to, and decide which are held out.

    Raises:
        DataError: names file, line and fault of the first bad rows and counts the others.
        ConfigError: a source or split does not exist, a column would decide and is not read, or two readings differ.
    """
    data, cut_short, codes = work.data, list[str](), dict[str, int]()
    reader, facts = work.format(data), [np.zeros(0, dtype=FACTS)]
    tally = reader.tally
    for outcome in _outcomes(work, _chunks(work.sources, tally.problems, cut_short), processes):
        tally.merge(outcome.tally)
        numbers = np.array([codes.setdefault(name, len(codes)) for name in outcome.splits], dtype="i2")
        outcome.facts["split"] = numbers[outcome.facts["split"]]
        facts.append(outcome.facts)
        if outcome.table is not None:
            keep(outcome.table)
    every = np.concatenate(facts)
    notes = reader.notes()
    notes += [f"max_rows: the rows after the first {which} were not read" for which in cut_short]
    dropped = [f"left out (data.bad_rows=drop): {line}" for line in tally.dropped.summary()]
    entries = np.array([source.entry for source in work.sources])
    division = divide(data, every, list(codes), entries, dropped)
    for split in division.splits.values():
        tally.unfit[split].raise_if_any()
    counts = {}
    for part, numbers in division.parts.items():
        left_out = (division.in_test_too, division.unmixed) if part == "train" else (0, 0)
        lost = tally.left_out[division.splits[part]] if part in division.splits else Counts()
        counts[part] = count(every[numbers], lost, *left_out)
        _check_optional(every[numbers], work.sources)
    return Found(counts, notes + dropped + division.notes, every, division.parts, tally)


def _check_optional(facts: Facts, sources: Sequence[Source]) -> None:
    kept = facts[facts["why"] == KEPT]
    having = int(kept["is_optional"].sum())
    if 0 < having < len(kept):
        without = kept[~kept["is_optional"]][0]
        where = sources[without["source"]].place(int(without["number"]))
        raise DataError(f"{where}: no {OPTIONAL!r}, but {having} of {len(kept)} rows have one")


def rows_at(work: Work[Row], places: Sequence[tuple[int, int]], orders: Sequence[int]) -> list[Row]:
    """Rows read again from where they stand, (number of the source, number of the row), and the `order` of each.

    Raises:
        DataError: the source has changed since it was read.
    """
    found = dict[tuple[int, int], Row]()
    for place, source in enumerate(work.sources):
        reader = work.format(source.data)
        numbers = {number for one, number in places if one == place}
        for number, content in read_again(source, numbers) if numbers else ():
            _, row = reader.row(source, number, content)
            if row is not None:
                found[place, number] = row
    for (at, number), order in zip(places, orders, strict=True):
        row = found.get((at, number))
        if row is None or order_of(content_of(row)) != order:
            raise DataError(f"{work.sources[at].place(number)} has changed since it was read; start again")
    return [found[place] for place in places]
