"""KID, the kernel distance between two sets of image features, computed by torchmetrics."""

import warnings

from des.utils.errors import UserError

import torch
from torch import Tensor, nn


def kernel_distance(generated: Tensor, reference: Tensor, subsets: int, subset_size: int, seed: int) -> tuple[float, float]:
    """The mean and standard deviation of KID over random subsets of features [n, d] and [m, d].

    Source: Binkowski et al., ICLR 2018. Raises UserError for a subset size below two or above the size of the smaller folder.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    smaller = min(len(generated), len(reference))
    if not 2 <= subset_size <= smaller:
        raise UserError(f"--kid_subset_size must be 2 to {smaller}, the number of images in the smaller folder")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the memory that stored features need
        metric = KernelInceptionDistance(nn.Identity(), subsets=subsets, subset_size=subset_size)
    metric.update(reference, real=True)
    metric.update(generated, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return tuple(value.item() for value in metric.compute())
