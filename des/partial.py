"""What a scorer found so far, kept beside its result until that is whole, so that an interrupted run goes on where it stopped."""

import json
from pathlib import Path
from typing import Any

from des import manifest


class Partial:
    """Findings by key in `.{name}.part.jsonl`; those of another `stamp` (other weights or options) do not count."""

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
                if entry["stamp"] == stamp:
                    self.found[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):  # half a line, which its process did not live to finish
                continue

    def add(self, found: dict[str, Any]) -> None:
        """Keep findings by their keys."""
        self.found |= found
        manifest.append(self.path, [{"stamp": self.stamp, "key": key, "value": value} for key, value in found.items()])

    def finish(self) -> None:
        """Let go of the file, once the result is written."""
        self.path.unlink(missing_ok=True)
