"""Results of unfinished work, kept on disk so that an interrupted run can resume."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from des.utils.files import sha256_texts, write_json
from des.utils.logs import logger

ADDED = ("encoder configuration",)  # absent from records of earlier versions, which are read as if theirs were equal


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names under which two records of what something was made from differ, sorted."""
    names = sorted(before.keys() | now.keys() - (set(ADDED) - before.keys()))
    return [name for name in names if before.get(name) != now.get(name)]


class Journal:
    """A file of JSON lines that several processes may append to; a line that is not whole is skipped when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """The lines of the file that are JSON objects, in order; empty where there is no file."""
        try:
            text = self.path.read_bytes().decode("utf-8", errors="replace")
        except FileNotFoundError:
            return []
        lines = []
        for part in text.split("\n"):
            try:
                line = json.loads(part)
            except (ValueError, RecursionError):  # a process died before it had written all of the line
                continue
            if isinstance(line, dict):
                lines.append(line)
        return lines

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append lines with one write, so that a reader sees each of them whole or not at all. Raises OSError on a full disk."""
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a process died within a line
                data = b"\n" + data
            if os.write(descriptor, data) != len(data):
                raise OSError(28, "No space left on device", str(self.path))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Findings(Journal):
    """The findings of an unfinished scorer by key, in `.{name}.part.jsonl` beside its result, so that it can resume.

    Lines with another `stamp` (other weights or options) are ignored, as are lines that were edited or have no checksum.
    """

    def __init__(self, result: Path, stamp: str):
        """Read the findings that an interrupted run of the result file `result` left."""
        super().__init__(result.with_name(f".{result.stem}.part.jsonl"))
        self.stamp = stamp
        self.found: dict[str, Any] = {}
        for line in self.lines():
            key, value = line.get("key"), line.get("value")
            if isinstance(key, str) and line.get("sha256") == self._line(key, value)["sha256"]:
                self.found[key] = value

    def add(self, found: Mapping[str, Any]) -> None:
        """Keep findings by their keys."""
        self.found |= found
        self.append(self._line(key, value) for key, value in found.items())

    def finish(self) -> None:
        """Remove the file; to be called once the result is written."""
        self.path.unlink(missing_ok=True)

    def _line(self, key: str, value: Any) -> dict[str, Any]:
        digest = sha256_texts([self.stamp, key, json.dumps(value)])
        return {"stamp": self.stamp, "key": key, "value": value, "sha256": digest}


class PartialFile:
    """The rows of an unfinished file `path`, in `{path}.part`, with their record in `{path}.part.json`.

    Opened again with the same `made_from`, it resumes after the `rows` of the record; otherwise it starts from scratch. The record
    has the hash of the bytes, so that a file with holes, which a crash of the machine can leave, is not continued.
    """

    def __init__(self, path: Path, made_from: Mapping[str, str], header: bytes = b""):
        self.path = path
        self.made_from = dict(made_from)
        self._data, self._record = (path.with_name(path.name + suffix) for suffix in (".part", ".part.json"))
        if self._continue():
            return
        self.discard()
        self.rows, self.size, self._digest = 0, 0, hashlib.sha256()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.append(header, 0)

    def append(self, data: bytes | memoryview, rows: int) -> None:
        """Append `rows` more rows, and record them."""
        with self._data.open("ab") as file:
            file.write(data)
        self._digest.update(data)
        self.size, self.rows = self.size + len(data), self.rows + rows
        facts = {"made_from": self.made_from, "rows": self.rows, "bytes": self.size, "sha256": self._digest.hexdigest()}
        write_json(self._record, facts)

    def read(self) -> bytes:
        """All bytes so far, the header included."""
        return (self._data if self._data.exists() else self.path).read_bytes()

    def finish(self) -> str:
        """Rename the finished file to `path` and return its sha256; the record stays until `forget`, for files that belong together."""
        if self._data.exists():
            self._data.replace(self.path)
        return self._digest.hexdigest()

    def forget(self) -> None:
        """Remove the record of a finished file."""
        self._record.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the partial file and its record."""
        self._data.unlink(missing_ok=True)
        self.forget()

    def _continue(self) -> bool:
        """Resume with the rows of an earlier run; returns whether they are undamaged and made from the same inputs."""
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
            before, rows, size, sha256 = (record[name] for name in ("made_from", "rows", "bytes", "sha256"))
            changed = differing(dict(before), self.made_from)
            file = self._data if self._data.exists() else self.path
            if file == self.path and not changed and file.stat().st_size != size:  # `path` is an earlier file, not these rows
                return False
            digest = None if changed else _digest_of(file, size)
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError):
            changed, digest = ["form"], None
        if changed:
            logger.warning("the unfinished %s has another %s; starting from scratch", self.path, " and another ".join(changed))
            return False
        if digest.hexdigest() != sha256:
            logger.warning("the unfinished %s is damaged; starting from scratch", self.path)
            return False
        os.truncate(file, size)
        self.rows, self.size, self._digest = rows, size, digest
        return True


def _digest_of(path: Path, size: int) -> "hashlib._Hash":
    """The running sha256 of a file's first `size` bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (chunk := file.read(min(size, 2**24))):
            digest.update(chunk)
            size -= len(chunk)
    return digest
