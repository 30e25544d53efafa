"""A map of prompt embeddings before and after training, by their two principal components."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from des.models.encoders import TextEncoder, spread

import torch
from torch import Tensor

MOST_PROMPTS = 200  # of a group
MOST_BYTES = 512 * 2**20  # of all embeddings in fp32, before and after training
GROUPS = ("safe", "unsafe", "concept", "empty")


@dataclass(frozen=True)
class EmbeddingMap:
    """The plane of two principal components of embeddings, and the points of groups of prompts (GROUPS) on it.

    `before` and `after` are points [prompts, 2] by the original and the protected encoder; `explained` is the share of the
    variance on each of the two axes.
    """

    centre: Tensor  # [tokens * hidden]
    axes: Tensor  # [2, tokens * hidden], orthonormal
    explained: tuple[float, float]
    before: dict[str, Tensor]
    after: dict[str, Tensor]

    def locate(self, embeddings: Tensor) -> Tensor:
        """Project flattened embeddings [prompts, tokens * hidden] of either encoder to points [prompts, 2]."""
        return (embeddings - self.centre) @ self.axes.T


def embed(encoder: TextEncoder, prompts: Sequence[str], batch_size: int = 32) -> Tensor:
    """Flattened embeddings [prompts, tokens * hidden] in fp32 on the CPU."""
    return torch.cat([batch.float().cpu().flatten(1) for batch in encoder.encode(list(prompts), batch_size)])


def draw_map(
    original: TextEncoder, protected: TextEncoder, prompts: Mapping[str, Sequence[str]], batch_size: int = 32
) -> EmbeddingMap:
    """Map groups of prompts by the principal components of both encoders' embeddings together.

    A group with more than MOST_PROMPTS prompts, or more than MOST_BYTES allow, is subsampled evenly.
    """
    rows, hidden = original.shape()
    room = max(4, MOST_BYTES // (2 * 4 * rows * hidden * len(prompts)))
    chosen = {name: [group[i] for i in spread(len(group), min(room, MOST_PROMPTS))] for name, group in prompts.items()}
    every = [prompt for group in chosen.values() for prompt in group]
    points = torch.cat([embed(encoder, every, batch_size) for encoder in (original, protected)])
    centre = points.mean(0)
    points -= centre
    variances, directions = torch.linalg.eigh((points @ points.T).double())  # the Gram matrix is small: few prompts
    axes = directions[:, -2:].flip(1).T.float() @ points
    axes = torch.nn.functional.normalize(axes, dim=1)
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # a component's sign is arbitrary
    first, second = (variances.flip(0)[:2] / variances.sum()).tolist()
    places = (points @ axes.T).split([len(group) for group in chosen.values()] * 2)
    halves = places[: len(chosen)], places[len(chosen) :]
    return EmbeddingMap(centre, axes, (first, second), *(dict(zip(chosen, half, strict=True)) for half in halves))
