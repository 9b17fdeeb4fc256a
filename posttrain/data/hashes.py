"""sha256 of files, remembered beside their size and times, so that a large file is read for it once."""

import hashlib
import json
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from posttrain.config.schema import Config
from posttrain.data.sources import Source
from posttrain.errors import DataError

CACHE, HASHES = ".cache", "posttrain-hashes.json"
YOUNG = 5.0  # seconds in which a file may change again without a later time


def cache_of(config: Config) -> Path:
    """The folder of prepared rows and remembered digests."""
    return Path(config.data.cache_dir) if config.data.cache_dir is not None else Path(config.output_dir) / CACHE


class Hashes:
    """Digests of files, and what is remembered of them in a folder."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / HASHES
        try:
            found = dict(json.loads(self.file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # not there yet, or broken: every digest is taken anew
            found = {}
        self.known: dict[str, list[object]] = {
            name: state for name, state in found.items() if isinstance(state, list) and len(state) == 5
        }
        self.is_new = False

    def of(self, file: Path) -> str:
        """The sha256 of a file's content.

        Raises:
            DataError: it cannot be read.
        """
        try:
            now, name = file.stat(), str(file.resolve())
            state = [now.st_size, now.st_mtime_ns, now.st_ino, now.st_ctime_ns]
            before = self.known.get(name, [])
            if before[:4] == state:
                return str(before[4])
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}; check its permissions") from error
        self.known.pop(name, None)
        if time.time() - max(now.st_mtime, now.st_ctime) > YOUNG:
            self.known[name], self.is_new = [*state, digest], True
        return digest

    def of_sources(self, sources: Sequence[Source]) -> dict[str, str]:
        """Name of each source -> its digest: of a file, of the files of a data set, or its fingerprint."""
        found = {}
        for source in sources:
            if isinstance(source.content, Path):
                found[str(source.content.resolve())] = self.of(source.content)
            elif source.is_given or not source.content.cache_files:
                found[source.name] = source.content._fingerprint
            else:
                parts = [self.of(Path(part["filename"])) for part in source.content.cache_files]
                found[source.name] = hashlib.sha256(" ".join(parts).encode()).hexdigest()
        return found

    def save(self) -> None:
        """Remember them, where the folder is there; others may write the file at the same time."""
        if not self.is_new or not self.file.parent.is_dir():
            return
        part = self.file.with_name(f".hashes-{uuid.uuid4().hex}")  # tempfile's own are for their owner's eyes alone
        part.write_text(json.dumps(self.known), encoding="utf-8")
        part.replace(self.file)
        self.is_new = False
