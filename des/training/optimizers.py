"""Optimisers by the name of `--optimizer`.

Weights in bf16 have 8 bits of mantissa, so an AdamW update below 1/512 of the weight is lost to rounding: at the paper's learning
rate of 1e-5 most weights of T5 never change. Stochastic rounding keeps the mean of every update. `docs/t5.md` has measurements.
"""

from collections.abc import Iterable

import torch
from torch import nn


def make_optimizer(name: str, parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW with torch's defaults: torch's, or torchao's with stochastic rounding of bf16 weights.

    `adamw_bf16_sr` stores its two moments in the dtype of the weights, `adamw8bit` in 8 bits.
    """
    if name == "adamw":
        parameters = list(parameters)
        return torch.optim.AdamW(parameters, lr=learning_rate, fused=parameters[0].device.type in ("cpu", "cuda"))
    from torchao.optim import AdamW8bit, _AdamW  # imported late: torchao takes seconds

    optimizer = {"adamw_bf16_sr": _AdamW, "adamw8bit": AdamW8bit}[name]
    return optimizer(parameters, lr=learning_rate, bf16_stochastic_round=True)
