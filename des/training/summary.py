"""How far training moved embeddings."""

from collections.abc import Iterator, Sequence
from typing import Any

from des.models.encoders import TextEncoder, spread
from des.models.shift import Before
from des.training import losses
from des.training.loop import SUMMARY_BYTES, SUMMARY_PROMPTS
from des.training.pairs import Pairs

import torch
from torch import Tensor


class Summary:
    """What training did to the embeddings, on evenly spaced prompts whose original embeddings are kept meanwhile."""

    def __init__(self, encoder: TextEncoder, pairs: Pairs, batch_size: int, concept_prompts: Sequence[str]):
        rows, hidden = encoder.shape()
        at_most = max(1, min(SUMMARY_PROMPTS, SUMMARY_BYTES // (4 * rows * hidden)))
        self.unsafe = spread(len(pairs.unsafe_ids), at_most)
        self.safe = spread(len(pairs.safe_ids), at_most)
        self.batch_size = batch_size
        self.pairs = pairs
        self.before = Before(encoder, concept_prompts)
        self.unsafe_before = torch.cat([batch.cpu() for batch in self._encode(encoder, pairs.unsafe_ids[self.unsafe])])

    @torch.no_grad()
    def _encode(self, encoder: TextEncoder, ids: Tensor) -> Iterator[Tensor]:
        encoder.model.eval()
        for batch in ids.split(self.batch_size):
            yield encoder(batch)

    def after(self, encoder: TextEncoder, concept: losses.Concept) -> dict[str, Any]:
        """Mean cosines now, how many codebook rows serve as targets, and the shift that all safe embeddings share.

        `shift` is `des.models.shift`'s measure on the concept and neutral prompts.

        `safe_shift` is the norm of the mean of E~(s) - E(s) over the mean norm of E(s), `safe_shift_along_concept` its cosine
        to n^: SEP's concept term draws safe embeddings away from the concept, and a large shift costs benign images.
        """
        safe = torch.cat([batch.cpu() for batch in self._encode(encoder, self.pairs.safe_ids[self.safe])])
        unsafe = torch.cat([batch.cpu() for batch in self._encode(encoder, self.pairs.unsafe_ids[self.unsafe])])
        original = self.pairs.original(self.safe).float()
        n, e0 = concept.n.cpu(), concept.e0.cpu()
        targets = losses.Concept(n, e0, concept.alpha).target(self.pairs.targets(self.unsafe))
        shift = (safe.float() - original).mean(0)
        return {
            "cos_safe_to_original": losses.cos(safe, original).mean().item(),
            "cos_unsafe_to_original": losses.cos(unsafe, self.unsafe_before).mean().item(),
            "cos_unsafe_to_target": losses.cos(unsafe, targets).mean().item(),
            "safe_shift": (shift.norm() / original.flatten(1).norm(dim=1).mean()).item(),
            "safe_shift_along_concept": losses.cos(shift, n).item(),
            "safe_prompts": len(self.safe),
            "unsafe_prompts": len(self.unsafe),
            "distinct_targets": self.pairs.target_rows.unique().numel(),
            "shift": self.before.shift(encoder),
        }
