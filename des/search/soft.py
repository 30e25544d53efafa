"""Input embeddings that no token has: feeding them to a text encoder, limiting their norm, and learning them by gradient."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def embedding_table(model: nn.Module) -> Tensor:
    """Return a text encoder's input embeddings [vocabulary, hidden], one row per token id."""
    return model.get_input_embeddings().weight


@contextlib.contextmanager
def input_embeddings(model: nn.Module, embeddings: Tensor) -> Iterator[None]:
    """Feed `embeddings` [batch, tokens, hidden] to a text encoder in place of those of its token ids inside this block.

    The ids of the call still decide where the prompt ends. Position embeddings are added as usual. Gradients flow to `embeddings`.
    """
    table = embedding_table(model)
    layers = [module for module in model.modules() if isinstance(module, nn.Embedding) and module.weight is table]
    handles = [layer.register_forward_hook(lambda *_: embeddings.to(table.dtype)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def with_vectors(model: nn.Module, ids: Tensor, vectors: Tensor, vector_ids: list[int]) -> Tensor:
    """Return the input embeddings [batch, tokens, hidden] of `ids`, with `vectors[j]` wherever the id is `vector_ids[j]`."""
    table = embedding_table(model).detach()
    embedded = table[ids].to(vectors.dtype)
    for vector, token in zip(vectors, vector_ids, strict=True):
        embedded = torch.where((ids == token)[..., None], vector, embedded)
    return embedded


def vocabulary_norm(model: nn.Module) -> float:
    """Return the norm of the longest input embedding of a text encoder's vocabulary."""
    return embedding_table(model).detach().float().norm(dim=-1).max().item()


def limit_norms(vectors: Tensor, max_norm: float | None) -> Tensor:
    """Return `vectors` [..., hidden] with those longer than `max_norm` scaled down to that length; None sets no limit."""
    return vectors if max_norm is None else vectors.renorm(2, 0, max_norm)


def learn_vectors(
    start: Tensor,
    loss: Callable[[Tensor], Tensor],
    steps: int,
    learning_rate: float,
    max_norm: float | None,
    accumulation: int = 1,
) -> Iterator[tuple[Tensor, float]]:
    """Minimise `loss(vectors)` by AdamW from `start` [vectors, hidden]; yields the vectors and the loss after each step.

    The vectors are one tensor, which the next step changes. `loss` draws its own batches; a step uses the mean gradient of
    `accumulation` calls. After each step, vectors longer than `max_norm` are scaled down to it.
    """
    vectors = start.detach().clone().float().requires_grad_()
    optimizer = torch.optim.AdamW([vectors], lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        values = []
        for _ in range(accumulation):
            value = loss(vectors) / accumulation
            value.backward()
            values.append(value.item())
        optimizer.step()
        with torch.no_grad():
            vectors.copy_(limit_norms(vectors, max_norm))
        yield vectors.detach(), sum(values)
