"""Unfinished results on disk, from which an interrupted run resumes."""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from des.utils.files import sha256_texts, write_json, writing
from des.utils.logs import logger

ADDED = ("encoder configuration",)  # inputs that records of earlier versions lack; they count as equal


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The sorted names of the inputs that differ between two records of what a file was made from."""
    names = sorted(before.keys() | now.keys() - (set(ADDED) - before.keys()))
    return [name for name in names if before.get(name) != now.get(name)]


class Journal:
    """A file of JSON lines that several processes may append to. Incomplete lines are skipped when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """The lines of the file that are JSON objects, in order; an empty list if the file is missing."""
        try:
            text = self.path.read_bytes().decode("utf-8", errors="replace")
        except FileNotFoundError:
            return []
        lines = []
        for part in text.split("\n"):
            try:
                line = json.loads(part)
            except (ValueError, RecursionError):  # a process died while it wrote this line
                continue
            if isinstance(line, dict):
                lines.append(line)
        return lines

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append lines with one write, so that readers see each line complete or not at all. Raises OSError on a full disk."""
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":  # the last line is incomplete
                data = b"\n" + data
            with writing(self.path, len(data)):
                if os.write(descriptor, data) != len(data):
                    raise OSError(errno.ENOSPC, "No space left on device")
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Findings(Journal):
    """Findings of an unfinished scorer by key, in `.{name}.part.jsonl` beside its result, so that it can resume.

    Lines with another `stamp` (other weights or options) are ignored, and so are lines whose checksum is wrong or missing.
    """

    def __init__(self, result: Path, stamp: str):
        """Read the findings that an interrupted run left beside the result file `result`."""
        super().__init__(result.with_name(f".{result.stem}.part.jsonl"))
        self.stamp = stamp
        self.found: dict[str, Any] = {}
        for line in self.lines():
            key, value = line.get("key"), line.get("value")
            if isinstance(key, str) and line.get("sha256") == self._line(key, value)["sha256"]:
                self.found[key] = value

    def add(self, found: Mapping[str, Any]) -> None:
        """Add findings, and append them to the file."""
        self.found |= found
        self.append(self._line(key, value) for key, value in found.items())

    def finish(self) -> None:
        """Remove the file. Call this after the result is written."""
        self.path.unlink(missing_ok=True)

    def _line(self, key: str, value: Any) -> dict[str, Any]:
        digest = sha256_texts([self.stamp, key, json.dumps(value)])
        return {"stamp": self.stamp, "key": key, "value": value, "sha256": digest}


class PartialFile:
    """The rows of an unfinished file `path`: data in `{path}.part`, and a record of them in `{path}.part.json`.

    If it is opened again with the same `made_from`, it resumes after the recorded `rows`; otherwise it starts from scratch. The
    record has the hash of the bytes, because a crash of the machine can leave a file with holes, which must not be resumed.
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
        with writing(self._data), self._data.open("ab") as file:
            file.write(data)
        self._digest.update(data)
        self.size, self.rows = self.size + len(data), self.rows + rows
        facts = {"made_from": self.made_from, "rows": self.rows, "bytes": self.size, "sha256": self._digest.hexdigest()}
        write_json(self._record, facts)

    def read(self) -> bytes:
        """All bytes written so far, including the header."""
        return (self._data if self._data.exists() else self.path).read_bytes()

    def finish(self) -> str:
        """Rename the finished file to `path` and return its sha256. The record stays until `forget`, when all shards are finished."""
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
        """Load the record of an earlier run; returns whether its rows are undamaged and made from the same inputs."""
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
            before, rows, size, sha256 = (record[name] for name in ("made_from", "rows", "bytes", "sha256"))
            changed = differing(dict(before), self.made_from)
            file = self._data if self._data.exists() else self.path
            if (
                file == self.path and not changed and file.stat().st_size != size
            ):  # `path` is an earlier file without these rows
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
