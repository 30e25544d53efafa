"""Findings of an unfinished scorer, kept beside its result until that is whole, so that the scorer can resume."""

import json
from pathlib import Path
from typing import Any

from des import manifest
from des.results import sha256_texts


class Partial:
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
