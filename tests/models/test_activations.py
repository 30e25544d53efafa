"""The lean QuickGELU against the library's."""

from des.models.activations import LeanQuickGELU
from des.models.encoders import load_encoder

import pytest
import torch
from conftest import GOLDEN
from transformers.activations import QuickGELUActivation


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_are_the_librarys(dtype):
    x = (4 * torch.randn(64, 33, dtype=dtype, generator=torch.Generator().manual_seed(0))).requires_grad_()
    y = x.detach().clone().requires_grad_()
    ours, theirs = LeanQuickGELU()(x), QuickGELUActivation()(y)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(x)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_encoders_use_it():
    model = load_encoder(str(GOLDEN / "A/model")).model
    kinds = {type(module) for module in model.modules()}
    assert LeanQuickGELU in kinds and QuickGELUActivation not in kinds
