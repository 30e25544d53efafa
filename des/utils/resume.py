"""Finished parts of long work, kept on disk so that an interrupted run can resume."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from des.data import manifest
from des.utils.files import sha256_texts, write_json
from des.utils.logs import logger

ADDED = ("encoder configuration",)  # records of earlier versions lack these, and are read as if they had the right ones


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names under which two records of what something was made from differ, sorted."""
    names = sorted(before.keys() | now.keys() - (set(ADDED) - before.keys()))
    return [name for name in names if before.get(name) != now.get(name)]


class PartialFile:
    """The rows of the file `path` on their way there: in `{path}.part`, described by `{path}.part.json`.

    Opened again with the same `made_from`, it keeps the rows that the record names, `rows` of them; anything else starts anew. The
    record has the hash of the bytes, so that a file which a crash of the machine has holed is not continued.
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
        """Give the whole file its name and return its sha256; the record stays, for when `path` is one of several, until `forget`."""
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
        """Take up the rows of an earlier run, if they are whole and made from the same."""
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
            before, rows, size, sha256 = (record[name] for name in ("made_from", "rows", "bytes", "sha256"))
            changed = differing(dict(before), self.made_from)
            file = self._data if self._data.exists() else self.path
            digest = None if changed else _digest_of(file, size)
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError):
            changed, digest = ["form"], None
        if changed:
            logger.warning("the unfinished %s is of another %s; starting anew", self.path, " and another ".join(changed))
            return False
        if digest.hexdigest() != sha256:
            logger.warning("the unfinished %s is damaged; starting anew", self.path)
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


class Findings:
    """Findings by key in `.{name}.part.jsonl`, one line each with a checksum.

    Lines of another `stamp` (other weights or options) do not count, nor do lines without the checksum of what they say: such a
    line was edited, or an earlier version wrote it, and its image is scored again.
    """

    def __init__(self, result: Path, stamp: str):
        """Open what an earlier run of the result file `result` left, if it left anything."""
        self.path = result.with_name(f".{result.stem}.part.jsonl")
        self.stamp = stamp
        self.found: dict[str, Any] = {}
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            return
        for line in lines:
            try:
                entry = json.loads(line)
                if entry["stamp"] == stamp and entry["sha256"] == _checksum(stamp, entry["key"], entry["value"]):
                    self.found[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):  # half a line, which its process did not live to finish
                continue

    def add(self, found: dict[str, Any]) -> None:
        """Keep findings by their keys."""
        self.found |= found
        lines = (
            {"stamp": self.stamp, "key": key, "value": value, "sha256": _checksum(self.stamp, key, value)}
            for key, value in found.items()
        )
        manifest.append(self.path, lines)

    def finish(self) -> None:
        """Let go of the file, once the result is written."""
        self.path.unlink(missing_ok=True)


def _checksum(stamp: str, key: str, value: Any) -> str:
    return sha256_texts([stamp, key, json.dumps(value)])
