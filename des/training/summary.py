"""How far training moved the embeddings of prompts, for a checkpoint's metadata and the log."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from des.models.encoders import TextEncoder, spread
from des.models.shift import Before, describe
from des.training import losses
from des.training.checks import unprotected
from des.training.pairs import Pairs
from des.utils.logs import logger

import torch
from torch import Tensor

_PROMPTS = 256  # at most, of each list
_BYTES = 256 * 2**20  # of fp32 embeddings at most, of each list


class Summary:
    """Measures how training changes the embeddings of evenly spaced prompts. Create it before training."""

    def __init__(self, encoder: TextEncoder, pairs: Pairs, batch_size: int, concept_prompts: Sequence[str]):
        rows, hidden = encoder.shape()
        at_most = max(1, min(_PROMPTS, _BYTES // (4 * rows * hidden)))
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
        """Mean cosine similarities after training, the number of different targets, and the common shift of safe embeddings.

        `safe_shift` is the norm of the mean of E~(s) - E(s), divided by the mean norm of E(s); `safe_shift_along_concept` is the
        cosine of that mean to n^. SEP's concept term moves safe embeddings away from the concept, and a large shift lowers the
        quality of benign images. `shift` is the measure of `des.models.shift` on the concept and neutral prompts.
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


def log_summary(after: Mapping[str, Any], checkpoint: Path) -> None:
    """Log the figures of `Summary.after`, and the path of the checkpoint."""
    message = (
        "mean cosine: safe to original %(cos_safe_to_original).4f (%(safe_prompts)d prompts), unsafe to original "
        "%(cos_unsafe_to_original).4f, unsafe to target %(cos_unsafe_to_target).4f (%(unsafe_prompts)d prompts)"
    )
    logger.info(message, after)
    logger.info(describe(after["shift"]))
    message = (
        "all safe embeddings moved by %(safe_shift).3f of their norm, cosine to the concept %(safe_shift_along_concept).2f"
    )
    logger.info(message + "; %(distinct_targets)d distinct targets", after)
    logger.info("%s encoder in %s", "trained" if unprotected(after) else "protected", checkpoint)
