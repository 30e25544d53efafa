"""The origin of a result: script, arguments, versions, git commit and device."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "diffusers", "numpy", "pillow")


def provenance(args: Any) -> dict[str, Any]:
    """The origin of a result, for its JSON; `args` has the script's options, and the torch.device `args.device`."""
    import torch

    return {
        "script": Path(sys.argv[0]).name,
        "arguments": dict(vars(args)),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else str(args.device),
    }


def _git_commit() -> str:
    """The commit of this checkout, with `-dirty` after changes; `unknown` without git or outside a repository."""
    root, command = Path(__file__).resolve().parents[2], ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:  # there is no git on PATH
        return "unknown"
