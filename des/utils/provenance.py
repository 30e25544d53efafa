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

    root = Path(__file__).resolve().parents[2]
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=root, capture_output=True, text=True)
    return {
        "script": Path(sys.argv[0]).name,
        "arguments": dict(vars(args)),
        "git_commit": git.stdout.strip() or None,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else str(args.device),
    }
