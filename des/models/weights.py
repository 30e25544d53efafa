"""Comparing weights: whether two sets of them differ by more than rounding, and how far two base models are apart."""

import base64
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_ROUNDED_TO = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_SAMPLES = 4  # of each matrix, in a sketch


def same_weights(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> bool:
    """Whether every tensor of `given` is the one of that name in `own`, exactly or up to rounding to a coarser float type.

    Storing a model in fp16, bf16 or fp8 changes nearly every number and protects from nothing. The numbers decide, not the type
    that holds them: weights that were rounded to bf16 and are stored in fp32 are rounded weights.
    """
    by_size = sorted(given, key=lambda name: given[name].numel())  # the first that differs ends the comparison
    return all(_same(own[name].detach().cpu(), given[name].detach().cpu()) for name in by_size)


def _same(own: Tensor, given: Tensor) -> bool:
    a, b = own.float(), given.float()
    if torch.equal(a, b):
        return True
    gap, own_step = (a - b).abs(), (b - b.to(own.dtype).float()).abs()
    if bool((gap <= own_step).all()):  # `own` is `given`, rounded when the model was loaded
        return True
    # `given` is `own`, rounded. A number that lies half-way between two coarser ones, or that the model's own type has moved
    # there, may have been rounded to either: as near as the nearest is near enough.
    for dtype in _ROUNDED_TO:
        if torch.equal(b.to(dtype).float(), b) and bool(
            (gap <= torch.maximum((a - a.to(dtype).float()).abs(), own_step)).all()
        ):
            return True
    return False


def sketch(state: Mapping[str, Tensor]) -> str:
    """A few numbers of every matrix of a state, in base64: enough to measure with `distance` how far two bases are apart.

    Numbers are taken at seeded places, of the matrices in the order of their names.
    """
    return base64.b64encode(_samples(state).numpy().astype("<f4").tobytes()).decode("ascii")


def distance(recorded: str, state: Mapping[str, Tensor]) -> float | None:
    """The distance of the weights in `state` from those that a `sketch` was made of, relative to the latter: 0 for the same.

    It is the mean difference of the samples of a matrix over their mean size, averaged over the matrices; about 1.4 for weights
    that have nothing to do with one another. Both are compared in the type of `state`. None where the sketch is of other matrices.
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
