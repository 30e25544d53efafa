"""The Fréchet distance between two sets of features, in float64 and right for fewer images than features too."""

import torch
from torch import Tensor


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)) of features x [n, d] and y [m, d], unbiased covariances S.

    With centred features X and Y, S_x S_y has the nonzero eigenvalues of A A^T for A = X Y^T / sqrt((n-1)(m-1)), so the trace
    of its root is the nuclear norm of A [n, m], or equally of R_x R_y^T [min(n, d), min(m, d)] from the QR decompositions of
    X^T and Y^T's Gram factors; no matrix root is taken. Source: Heusel et al., NeurIPS 2017. Raises ValueError for fewer than two rows.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError("a covariance needs at least two images")
    x, y = x.double(), y.double()
    mean_gap = (x.mean(0) - y.mean(0)).square().sum()
    x, y = _root_of_covariance(x), _root_of_covariance(y)
    trace = torch.linalg.matrix_norm(x @ y.T, ord="nuc")
    return (mean_gap + x.square().sum() + y.square().sum() - 2 * trace).item()


def _root_of_covariance(features: Tensor) -> Tensor:
    """R [min(n, d), d] with R^T R the unbiased covariance of features [n, d]."""
    centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(features) > features.shape[1] else centred
