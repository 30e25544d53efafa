"""Loading pretrained models so that what loads is what was asked for."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from des.cli import UserError

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn whatever a library raises for missing, damaged or foreign files into a UserError about `what`."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} could not be loaded: {reason}") from None


def read_pt(path: Path) -> Any:
    """Read a `.pt` file of tensors and plain values on the CPU, or None where it is anything else; no code in it is run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # the restricted unpickler raises errors of any class at damaged bytes
        return None


def load_model(
    model_class: type[PreTrainedModel],
    source: str,
    device: torch.device | str,
    what: str,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> PreTrainedModel:
    """Load a transformers model in eval mode, with every parameter from its files (transformers itself would only warn).

    `what` names it in errors; with a `device_map` among the options its layers go where that says. Raises UserError for files
    that are missing or unreadable and for parameters they lack.
    """
    with loading(f"{what} {source}"):
        model, info = model_class.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise UserError(f"{what} {source} lacks or mismatches {len(wrong)} parameters, {wrong[0]} first")
    return model.eval() if options.get("device_map") else model.eval().to(device)
