"""The Fréchet distance between two sets of features, in float64; it is also exact for fewer images than features."""

import io
from pathlib import Path
from typing import Any, NamedTuple

from des.utils.errors import UserError
from des.utils.files import replacing

import numpy as np
import torch
from torch import Tensor

FACTS = {"n": int, "variant": str, "extractor_sha256": str, "configuration_sha256": str, "images_sha256": str}
"""The facts that a file of statistics may record about its mu and sigma, with their types."""
TOLERANCE = 1e-5  # asymmetry and negative eigenvalues allowed in a file's covariance, relative to its largest eigenvalue


class Gaussian(NamedTuple):
    """A mean [d] and a root R [r, d] of the unbiased covariance R^T R, both float64; r is as small as the data allow."""

    mean: Tensor
    root: Tensor

    @classmethod
    def of_features(cls, features: Tensor) -> "Gaussian":
        """The Gaussian of features [n, d] of any float type. Raises ValueError for fewer than two rows."""
        if len(features) < 2:
            raise ValueError("a covariance needs at least two images")
        features = features.double()
        mean = features.mean(0)
        root = (features - mean) / (len(features) - 1) ** 0.5
        return cls(mean, torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root)

    @classmethod
    def of_covariance(cls, mean: Tensor, covariance: Tensor) -> "Gaussian":
        """The Gaussian of a mean [d] and a covariance [d, d].

        Eigenvalues at the level of rounding noise are set to zero: the root of 1e-16 is 1e-8, and two thousand of those would
        change the distance. Raises ValueError for shapes that do not match, values that are not finite, and a matrix that is
        not a covariance.
        """
        mean, covariance = mean.double(), covariance.double()
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"mean {list(mean.shape)} and covariance {list(covariance.shape)} do not match")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("mu or sigma holds values that are not finite")
        values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        largest = values.abs().max()
        if (covariance - covariance.T).abs().max() > TOLERANCE * largest or values.min() < -TOLERANCE * largest:
            raise ValueError("sigma is not a covariance matrix (not symmetric, or with negative eigenvalues)")
        kept = values > len(mean) * torch.finfo(torch.float64).eps * largest
        return cls(mean, values[kept].sqrt()[:, None] * vectors[:, kept].T)

    def covariance(self) -> Tensor:
        """The unbiased covariance [d, d]."""
        return self.root.T @ self.root

    def distance(self, other: "Gaussian") -> float:
        """|m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) for the covariances S, without a matrix square root.

        S_1 S_2 has the nonzero eigenvalues of A A^T for A = R_1 R_2^T, which are those of S_1^(1/2) S_2 S_1^(1/2), so the trace
        of its root is the nuclear norm of A. Source: Heusel et al., NeurIPS 2017. Raises ValueError for different widths.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"Gaussians of {len(self.mean)} and of {len(other.mean)} features cannot be compared")
        trace = torch.linalg.matrix_norm(self.root @ other.root.T, ord="nuc")
        gap = (self.mean - other.mean).square().sum()
        distance = gap + self.root.square().sum() + other.root.square().sum() - 2 * trace
        return max(0.0, distance.item())  # rounding can make the distance of equal Gaussians negative


def save_statistics(path: Path, gaussian: Gaussian, facts: dict[str, Any]) -> None:
    """Write an npz file with `mu` [d] and `sigma` [d, d] in float64, as pytorch-fid does, and with `facts` (of FACTS)."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=gaussian.mean.cpu().numpy(), sigma=gaussian.covariance().cpu().numpy(), **facts)


def load_statistics(path: Path) -> tuple[Gaussian, dict[str, Any]]:
    """Read a file of `save_statistics`, pytorch-fid or clean-fid; returns the Gaussian and those of FACTS that the file records.

    Raises UserError if the file is not such an npz, or its mu and sigma are not a mean and a covariance. No code in it is run.
    """
    content = path.read_bytes()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        gaussian = Gaussian.of_covariance(*(torch.from_numpy(np.asarray(arrays.pop(key), "f8")) for key in ("mu", "sigma")))
        facts = {name: arrays[name].item() for name in FACTS if name in arrays and arrays[name].ndim == 0}
        return gaussian, {name: value for name, value in facts.items() if isinstance(value, FACTS[name])}
    except KeyError as missing:
        raise UserError(f"{path} is not a file of FID statistics: it has no array {missing}") from None
    except Exception as error:  # numpy and zipfile raise errors of any class for damaged bytes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not a file of FID statistics: {reason}") from None
