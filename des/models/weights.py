"""Comparing weights: whether two sets differ by more than rounding, and the distance of two base models."""

import base64
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_ROUNDED_TO = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_SAMPLES = 4  # of each matrix, in a sketch


def same_weights(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> bool:
    """Whether every tensor of `given` equals the one of that name in `own`, exactly or up to rounding of either to a coarser type.

    Storing a model in fp16, bf16 or fp8 changes nearly every number but does not protect. Values are compared, not dtypes: weights
    rounded to bf16 and stored in fp32 count as rounded.
    """
    by_size = sorted(given, key=lambda name: given[name].numel())  # the comparison stops at the first difference
    if all(_same(own[name].detach().cpu(), given[name].detach().cpu()) for name in by_size):
        return True
    # `own` may have been read from files of the variant fp16 or bf16, and `given` may be the original of those files.
    halves = (torch.float16, torch.bfloat16)
    return any(
        all(torch.equal(own[n].detach().cpu().float(), given[n].cpu().to(half).float()) for n in by_size) for half in halves
    )


def _same(own: Tensor, given: Tensor) -> bool:
    a, b = own.float(), given.float()
    if torch.equal(a, b):
        return True
    gap, own_step = (a - b).abs(), (b - b.to(own.dtype).float()).abs()
    if bool((gap <= own_step).all()):  # `own` is `given`, rounded when the model was loaded
        return True
    # `given` may be `own`, rounded. A number half-way between two coarser ones, also after rounding to the model's dtype, may
    # have been rounded either way, so any number as near as the nearest is accepted.
    for dtype in _ROUNDED_TO:
        if torch.equal(b.to(dtype).float(), b) and bool(
            (gap <= torch.maximum((a - a.to(dtype).float()).abs(), own_step)).all()
        ):
            return True
    return False


def sketch(state: Mapping[str, Tensor]) -> str:
    """Return a few numbers of every matrix of a state in base64, for `distance`; seeded positions, matrices in order of name."""
    return base64.b64encode(_samples(state).numpy().astype("<f4").tobytes()).decode("ascii")


def distance(recorded: str, state: Mapping[str, Tensor]) -> float | None:
    """Return the relative distance of the weights in `state` from those of a `sketch`, 0 for equal weights.

    It is the mean absolute difference of a matrix's samples over their mean absolute value, averaged over the matrices; about 1.4
    for unrelated weights. Values are compared in the dtype of `state`. None if the sketch has other matrices.
    """
    now = _samples(state)
    try:
        numbers = np.frombuffer(base64.b64decode(recorded, validate=True), dtype="<f4")
    except (ValueError, TypeError):
        return None
    if len(numbers) != now.numel():
        return None
    before = torch.from_numpy(numbers.copy()).to(next(iter(state.values())).dtype).float().reshape(now.shape)
    sizes = before.abs().mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((now - before).abs().mean(1) / sizes).clamp(max=2).mean().item()  # a matrix of zeros has no size


def _samples(state: Mapping[str, Tensor]) -> Tensor:
    """[matrices, samples] in fp32, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _, tensor in sorted(state.items()):
        if tensor.ndim >= 2:
            places = torch.randint(tensor.numel(), (_SAMPLES,), generator=generator)
            rows.append(tensor.detach().reshape(-1)[places.to(tensor.device)].float().cpu())
    return torch.stack(rows) if rows else torch.zeros(0, _SAMPLES)
