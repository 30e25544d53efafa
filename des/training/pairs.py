"""Pairs of unsafe and safe prompts, in batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from des.training.codebook import Codebook

import torch
from torch import Tensor

SEEDS = 2**64  # seeds of a torch.Generator are below it


@dataclass
class Pairs:
    """Unsafe and safe prompts as token ids, and the codebook rows with the constants of their losses."""

    unsafe_ids: Tensor  # [unsafe, tokens]
    safe_ids: Tensor  # [safe, tokens]
    target_rows: Tensor  # [unsafe], codebook rows of s*
    safe_rows: Tensor  # [safe], rows of `originals`
    codebook: Codebook
    originals: Codebook  # holds E(s) of every safe prompt; usually the codebook itself

    @classmethod
    def of(
        cls,
        unsafe_ids: Tensor,
        safe_ids: Tensor,
        target_rows: Tensor,
        safe: Sequence[str],
        codebook: Codebook,
        originals: Codebook,
    ) -> "Pairs":
        """Look up the row of each safe prompt in `originals`. Raises KeyError if a prompt has none."""
        row_of = {prompt: row for row, prompt in enumerate(originals.prompts)}
        safe_rows = torch.tensor([row_of[prompt] for prompt in safe])
        return cls(unsafe_ids, safe_ids, target_rows, safe_rows, codebook, originals)

    def __len__(self) -> int:
        """The length of the longer list; the shorter one is repeated cyclically."""
        return max(len(self.unsafe_ids), len(self.safe_ids))

    def batches(self, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the prompt rows (unsafe [n], safe [n]) of each batch, shuffled by seed and epoch; the last batch may be smaller."""
        generator = torch.Generator().manual_seed((seed * 100_003 + epoch) % SEEDS)
        order = torch.randperm(len(self), generator=generator)
        for rows in order.split(batch_size):
            yield rows % len(self.unsafe_ids), rows % len(self.safe_ids)

    def targets(self, unsafe: Tensor) -> Tensor:
        """s* of the given unsafe prompts, [batch, tokens, hidden], on the CPU."""
        return self.codebook.rows(self.target_rows[unsafe])

    def original(self, safe: Tensor) -> Tensor:
        """E(s) of the given safe prompts, [batch, tokens, hidden], on the CPU."""
        return self.originals.rows(self.safe_rows[safe])
