"""Loading pretrained models so that what loads is what was asked for."""

import contextlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from des.models.families import DTYPES
from des.utils.errors import UserError

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for one of the names of `--dtype`."""
    return getattr(torch, DTYPES[name])


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn whatever a library raises for missing, damaged or foreign files into a UserError about `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries raise errors of any class at damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "weights_only" in reason:  # torch advises to switch off what keeps code from running
            reason = "a file of it holds code, or is damaged"
        raise UserError(f"{what} could not be loaded: {reason}") from None


def read_pt(path: Path) -> Any:
    """Read a `.pt` file of tensors and plain values on the CPU, or None where it is anything else; no code in it is run."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if file.testzip() is not None:  # torch.load itself does not look at the checksums
                    return None
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # the restricted unpickler raises errors of any class at damaged bytes
        return None


def read_state(path: Path, what: str) -> Mapping[str, Tensor]:
    """Read a `.pt` file of named tensors; UserError where it is no file of `what`, or has NaN or infinite values."""
    state = read_pt(path)
    if not (isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise UserError(f"{path} is not a file of {what}")
    check_finite(state, f"the file of {what} {path}")
    return state


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise UserError where `what` has NaN or infinite values: a detector or model with those gives figures like any other."""
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not _is_finite(tensor)]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UserError(f"{what} has NaN or infinite values in `{broken[0]}`{more}")


def _is_finite(tensor: Tensor) -> bool:
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # fp8 has no isfinite of its own
    return tensor.is_meta or bool(wide.isfinite().all())


def load_model(
    model_class: type["PreTrainedModel"],
    source: str,
    device: torch.device | str,
    what: str,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> "PreTrainedModel":
    """Load a transformers model in eval mode, with every parameter from its files (transformers itself would only warn).

    `what` names it in errors; with a `device_map` among the options its layers go where that says. Raises UserError for files
    that are missing or unreadable, for parameters they lack, for layers that config.json does not have, and for values that are
    not finite. Code beside the files is not run.
    """
    options = {"trust_remote_code": False} | options
    with loading(f"{what} {source}"):
        model, info = model_class.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise UserError(f"{what} {source} lacks or mismatches {len(wrong)} parameters, {wrong[0]} first")
    surplus = surplus_layers(model, info["unexpected_keys"])
    if surplus:
        described = f"{what} {source} has {len(surplus)} tensors in layers that its config.json does not describe"
        raise UserError(f"{described}, `{surplus[0]}` first; put the config.json there that belongs to these weights")
    check_finite(model.state_dict(), f"{what} {source}")
    return model.eval() if options.get("device_map") else model.eval().to(device)


def surplus_layers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of a file's unused tensors that lie in one of the model's own stacks of layers, sorted.

    A configuration with fewer layers than the file leaves the last ones over, and the model runs shortened. Other parts of a larger
    model (CLIP's vision half, T5's decoder, a classifier's head) and constants such as `position_ids` are in no stack of `model`.
    """
    stacks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    prefixes = ("text_model.", f"{getattr(model, 'base_model_prefix', '')}.")
    return sorted(name for name in names if any(name.removeprefix(prefix).startswith(stacks) for prefix in ("", *prefixes)))
