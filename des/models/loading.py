"""Loading pretrained models and tensors with errors instead of warnings."""

import contextlib
import importlib.metadata
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from des.models.families import DTYPES
from des.utils.errors import UserError
from des.utils.hub import is_offline, missing, refusal, try_hub

import torch
from packaging.version import Version
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_DTYPE_SINCE = {"transformers": (4, 56), "diffusers": (0, 40)}  # releases since which `from_pretrained` reads `dtype`


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for a value of `--dtype`."""
    return getattr(torch, DTYPES[name])


def release(library: str) -> tuple[int, ...]:
    """Return the release number of an installed library, such as (4, 56, 1)."""
    return Version(importlib.metadata.version(library)).release


def dtype_option(library: str, dtype: Any) -> dict[str, Any]:
    """Return the option of `from_pretrained` that sets the dtype in the installed release of `library`, transformers or diffusers.

    Releases before those in _DTYPE_SINCE call it `torch_dtype` and silently ignore `dtype`; use `check_dtype` on the result.
    """
    return {"dtype" if release(library) >= _DTYPE_SINCE[library] else "torch_dtype": dtype}


def check_dtype(modules: Mapping[str, Any], dtype: torch.dtype, what: str) -> None:
    """Raise UserError if one of these modules (by name; other values are skipped) was loaded in another dtype than `dtype`."""
    for name, module in modules.items():
        if isinstance(module, nn.Module) and module.dtype != dtype:
            raise UserError(
                f"the {name} of {what} was loaded in {module.dtype} instead of {dtype}; update diffusers and transformers"
            )


def features(output: Any) -> Tensor:
    """Return the features [batch, width] from the output of CLIP's `get_text_features` or `get_image_features`.

    transformers 5 returns them as `pooler_output`, transformers 4 returns the tensor itself.
    """
    return output if isinstance(output, Tensor) else output.pooler_output


@contextlib.contextmanager
def loading(what: str, source: str = "") -> Iterator[None]:
    """Turn any error of a library inside this block into a UserError about `what`.

    `source` is the folder or hub id that the block reads, if it may be a hub id. Without a connection the block then uses the local
    cache at once, and the error says what is missing.
    """
    try:
        if source:
            try_hub(source)
        yield
    except UserError:
        raise
    except Exception as error:  # libraries raise errors of any class for damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "weights_only" in reason:  # torch's message suggests turning off the protection against code
            reason = "one of its files contains code or is damaged"
        if source and not Path(source).exists() and is_offline() and isinstance(error, OSError):
            reason = missing(source)  # in place of transformers' advice for models that exist nowhere
        reason = refusal(error, source) or reason
        raise UserError(f"{what} could not be loaded: {reason}") from None


def read_pt(path: Path) -> Any:
    """Read a `.pt` file of tensors and plain values on the CPU without running code; None if it contains anything else."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if file.testzip() is not None:  # torch.load does not verify checksums
                    return None
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.filename is None:  # torch seeks beyond the end of some truncated files
            return None
        raise
    except Exception:  # the restricted unpickler raises errors of any class for damaged bytes
        return None


def read_state(path: Path, what: str) -> Mapping[str, Tensor]:
    """Read a `.pt` file of named tensors, described by `what`; UserError if it is another file or has NaN or infinite values."""
    state = read_pt(path)
    if not (isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise UserError(f"{path} is not a file of {what}")
    check_finite(state, f"the file of {what} {path}")
    return state


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise UserError if tensors have NaN or infinite values, since a broken detector or model would still produce figures."""
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not _is_finite(tensor)]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UserError(f"{what} has NaN or infinite values in `{broken[0]}`{more}")


def _is_finite(tensor: Tensor) -> bool:
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # isfinite does not support fp8
    return tensor.is_meta or bool(wide.isfinite().all())


def load_model(
    model_class: type["PreTrainedModel"],
    source: str,
    device: torch.device | str,
    what: str,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> "PreTrainedModel":
    """Load a transformers model in eval mode, with every parameter from its files (transformers only warns about missing ones).

    `what` describes it in errors. A `device_map` among the options replaces `device`. Raises UserError for missing or unreadable
    files, missing parameters, layers that config.json does not describe, and values that are not finite. Code in the model's
    repository is not run.
    """
    options = {"trust_remote_code": False} | options
    with loading(f"{what} {source}", source):
        model, info = model_class.from_pretrained(
            source, output_loading_info=True, **dtype_option("transformers", dtype), **options
        )
    check_dtype({"model": model}, dtype, f"{what} {source}")
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise UserError(f"{what} {source} lacks or mismatches {len(wrong)} parameters, {wrong[0]} first")
    surplus = surplus_layers(model, info["unexpected_keys"])
    if surplus:
        described = f"{what} {source} has {len(surplus)} tensors in layers that its config.json does not describe"
        raise UserError(f"{described}, `{surplus[0]}` first; use the config.json that belongs to these weights")
    check_finite(model.state_dict(), f"{what} {source}")
    return model.eval() if options.get("device_map") else model.eval().to(device)


def surplus_layers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return those of a file's unused tensors, sorted, that belong to a stack of layers of the model.

    If config.json has fewer layers than the file, the last ones are unused and the model is truncated. Parts of a larger model
    (CLIP's vision tower, T5's decoder, a classifier's head) and constants such as `position_ids` are in no stack of `model`.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    stacks = tuple(
        f"{each}." for name in lists for each in (name, name.removeprefix("text_model."))
    )  # transformers 4 has the prefix
    prefixes = ("text_model.", f"{getattr(model, 'base_model_prefix', '')}.")
    return sorted(name for name in names if any(name.removeprefix(prefix).startswith(stacks) for prefix in ("", *prefixes)))
