"""The losses of DES in the paper's notation (section 4; `docs/method.md` maps each formula to its function).

Every argument is a batch of embeddings [batch, tokens, hidden] or one embedding [tokens, hidden]. Cosine similarity is computed in
fp32 on flattened embeddings of tokens * hidden components, padding included.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SEP, UEN, NEN = 1, 2, 3  # the ids of `--ablation`


def cos(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of flattened embeddings: [batch, tokens, hidden] each (or one for all) to [batch]."""
    a, b = torch.broadcast_tensors(a.float(), b.float())
    return F.cosine_similarity(a.flatten(-2), b.flatten(-2), dim=-1)


@dataclass(frozen=True)
class Concept:
    """Embeddings of the frozen encoder, `n` = E(concept prompt) and `e0` = E(""), each [tokens, hidden], and the scale `alpha`.

    For several concept prompts, `n` is their `joint` embedding.
    """

    n: Tensor
    e0: Tensor
    alpha: float

    @property
    def shift(self) -> Tensor:
        """alpha * n^, where n^ = n / |n|, [tokens, hidden] in fp32."""
        return self.alpha * self.n.float() / self.n.float().norm()

    def target(self, farthest: Tensor) -> Tensor:
        """t(u) = s* - alpha * n^ for the codebook rows s* that are most distant from each u, [batch, tokens, hidden]."""
        return farthest.float() - self.shift


def joint(embeddings: Tensor) -> Tensor:
    """One n for several concepts: E(concept prompts) [concepts, tokens, hidden] to [tokens, hidden].

    Its direction is the mean of their directions, so that each concept has the same weight whatever its norm; its norm is the mean
    of their norms. For one concept it is that concept's embedding.
    """
    if len(embeddings) == 1:
        return embeddings[0]
    norms = embeddings.flatten(1).norm(dim=1)
    mean = (embeddings / norms[:, None, None]).mean(0)
    return norms.mean() * mean / mean.norm()


def sep(safe: Tensor, original: Tensor, concept: Concept) -> tuple[Tensor, Tensor]:
    """Safe embedding preservation, its two terms: 1 - cos(E~(s), E(s)) and 1 - cos(E~(s) + alpha * n^, E(s)), batch means."""
    return (1 - cos(safe, original)).mean(), (1 - cos(safe.float() + concept.shift, original)).mean()


def uen(unsafe: Tensor, target: Tensor) -> Tensor:
    """Unsafe embedding neutralization: 1 - cos(E~(u), t(u)), batch mean."""
    return (1 - cos(unsafe, target)).mean()


def nen(concept_embeddings: Tensor, concept: Concept) -> Tensor:
    """Nudity (concept) embedding neutralization: 1 - cos(E~(concept), e0), a term for each concept [concepts, tokens, hidden]."""
    return (1 - cos(concept_embeddings, concept.e0)).sum()


def total(
    unsafe: Tensor,
    safe: Tensor,
    concept_embeddings: Tensor,
    target: Tensor,
    original: Tensor,
    concept: Concept,
    lambda_safe: float = 0.3,
    ablation: Collection[int] = (SEP, UEN, NEN),
    share: float = 1.0,
    concept_term: bool = True,
) -> dict[str, Tensor]:
    """lambda * SEP + (1 - lambda) * (UEN + NEN) over the losses named in `ablation`, and each of its parts.

    `unsafe`, `safe`, `concept_embeddings` come from E~ with gradients; `target` and `original` = E(s) are constants. Returns the
    scalars `sep` (first term), `sep_concept` (second term), `uen`, `nen` and `total`. A loss that is switched off is 0; without
    `concept_term`, so is SEP's second term (the paper's ablation). `share` weights this process's part of a batch:
    processes * rows of this process / rows of the batch.
    """
    zero = safe.new_zeros((), dtype=torch.float32)
    first, second = sep(safe, original, concept) if SEP in ablation else (zero, zero)
    parts = {
        "sep": share * first,
        "sep_concept": share * second if concept_term else zero,
        "uen": share * uen(unsafe, target) if UEN in ablation else zero,
        "nen": nen(concept_embeddings, concept) if NEN in ablation else zero,
    }
    parts["total"] = lambda_safe * (parts["sep"] + parts["sep_concept"]) + (1 - lambda_safe) * (parts["uen"] + parts["nen"])
    return parts
