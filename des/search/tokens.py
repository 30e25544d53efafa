"""Searching prompts token by token: by coordinate gradient, on the probability simplex, by nearest tokens, and genetically.

Candidates are always evaluated as texts, encoded again by the tokenizer, because a text is what a pipeline gets.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from des.models.encoders import TextEncoder
from des.search.soft import embedding_table, input_embeddings
from des.utils.errors import UserError

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot
from transformers import PreTrainedTokenizerBase

_TRIES = 200  # random prompts until one survives decoding and encoding


def seeded(*parts: object) -> torch.Generator:
    """Return a CPU generator whose seed is a hash of `parts`, such as seed, row and restart."""
    digest = hashlib.sha256(json.dumps(parts, default=str).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def whole_words(words: Sequence[str]) -> re.Pattern[str] | None:
    """Return a pattern that finds each of some words or phrases in any case, not within a word; None if there is none."""
    among = sorted({word.strip() for word in words if word.strip()}, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, among))})(?!\w)", re.IGNORECASE) if among else None


def room_for(count: int, tokenizer: PreTrainedTokenizerBase, length: int) -> int:
    """Return how many tokens of a prompt are read at `length` with special tokens; UserError if these are fewer than `count`."""
    room = length - len(tokenizer("").input_ids)
    if count > room:
        raise UserError(f"the text encoder reads {room} tokens of a prompt, fewer than {count}; use a smaller --tokens")
    return room


class Vocabulary:
    """The tokens that a search may use, and which sequences of them are prompts.

    `usable` [vocabulary] is True for tokens that are not special, whose text alone is encoded as that token again, and whose text
    is not among the `forbidden` words. A found prompt contains no forbidden word, and `refused` returns False for it.
    """

    def __init__(
        self, encoder: TextEncoder, forbidden: Sequence[str] = (), refused: Callable[[str], bool] = lambda text: False
    ):
        self.tokenizer: PreTrainedTokenizerBase = encoder.tokenizer
        self.length = encoder.length
        self.refused = refused
        self.words = whole_words(forbidden)
        before = self.tokenizer("").input_ids
        self.before, self.after = before[:-1], before[-1:]
        count = min(len(self.tokenizer), len(embedding_table(encoder.model)))
        texts = self.texts([[token] for token in range(count)])
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        alone = self.encode(texts)
        usable = [
            token not in special
            and alone[token] == [token]
            and texts[token].isprintable()
            and not self.names_forbidden(texts[token])
            for token in range(count)
        ]
        self.usable = torch.zeros(len(embedding_table(encoder.model)), dtype=torch.bool)
        self.usable[:count] = torch.tensor(usable)
        if not self.usable.any():
            raise UserError("no token is left to search with: all are special or forbidden; shorten --forbidden_tokens")

    def names_forbidden(self, text: str) -> bool:
        """Whether a text contains a forbidden word as a whole word."""
        return bool(self.words and self.words.search(text))

    def texts(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Decode token ids without special tokens, one list per prompt."""
        decoded = self.tokenizer.batch_decode([list(each) for each in ids], clean_up_tokenization_spaces=False)
        return [text.strip() for text in decoded]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Encode texts without special tokens, untruncated."""
        return self.tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False).input_ids

    def surviving(self, ids: Sequence[Sequence[int]]) -> list[str | None]:
        """Return the text of each id list, or None where its text is encoded as other ids or is not printable."""
        texts = self.texts(ids)
        again = self.encode(texts)
        return [
            text if list(before) == after and text.isprintable() else None
            for text, before, after in zip(texts, ids, again, strict=True)
        ]

    def allowed(self, text: str) -> bool:
        """Whether a text may be found: it contains no forbidden word and is not refused."""
        return bool(text.strip()) and not self.names_forbidden(text) and not self.refused(text)

    def random(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ids [count] of random usable tokens whose text survives and is allowed."""
        among = self.usable.nonzero()[:, 0]
        for _ in range(_TRIES):
            ids = among[torch.randint(len(among), (count,), generator=generator)]
            text = self.surviving([ids.tolist()])[0]
            if text is not None and self.allowed(text):
                return ids
        raise UserError(
            f"no prompt of {count} random tokens survives decoding and encoding and is allowed; use fewer tokens or fewer --forbidden_tokens"
        )

    def rows(self, ids: Tensor, head: Sequence[int] = (), tail: Sequence[int] = ()) -> tuple[Tensor, slice]:
        """Return the encoder's input row [length] for the ids `head`, `ids` [k] and `tail`, and the slots of `ids` in it.

        As the tokenizer does, it adds special tokens and padding; the head and then the tail are truncated to make room for `ids`.
        """
        room = self.room(len(ids))
        head = list(head)[: room - len(ids)]
        content = [*head, *ids.tolist(), *tail][:room]
        row = [*self.before, *content, *self.after]
        start = len(self.before) + len(head)
        row += [self.tokenizer.pad_token_id] * (self.length - len(row))
        return torch.tensor(row), slice(start, start + len(ids))

    def room(self, length: int) -> int:
        """Return how many tokens of a prompt the encoder reads; UserError if these are fewer than `length`."""
        return room_for(length, self.tokenizer, self.length)


def best_allowed(vocabulary: Vocabulary, texts: Sequence[str], losses: Tensor) -> int | None:
    """Return the index of the allowed text with the lowest loss; None if no text is allowed."""
    return next((i for i in losses.argsort(stable=True).tolist() if vocabulary.allowed(texts[i])), None)


# ---------------------------------------------------------------- coordinate gradient


def token_gradient(model: nn.Module, rows: Tensor, slots: slice, loss: Callable[[], Tensor]) -> Tensor:
    """Return the gradient of `loss()` to the one-hot matrix of the tokens in `slots`: [n, slots, vocabulary].

    `loss` calls `model` on `rows` [n, length] and returns one value per row.
    """
    table = embedding_table(model).detach()
    embedded = table[rows].detach().requires_grad_()
    with input_embeddings(model, embedded), torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss().sum(), embedded)
    return gradient[:, slots].float() @ table.float().T


def coordinate_candidates(
    gradient: Tensor, ids: Tensor, usable: Tensor, count: int, top: int, generator: torch.Generator
) -> Tensor:
    """Return `count` variants [count, k] of `ids` [k], each with one random position changed to one of its `top` best tokens.

    The best tokens of a position have the lowest `gradient` [k, vocabulary] among the `usable` ones. Source: greedy coordinate
    gradient, as MMA-Diffusion uses it.
    """
    scores = gradient.cpu().masked_fill(~usable, float("inf"))
    best = scores.topk(min(top, int(usable.sum())), largest=False).indices
    positions = torch.randint(len(ids), (count,), generator=generator)
    choices = torch.randint(best.shape[1], (count,), generator=generator)
    found = ids.repeat(count, 1)
    found[torch.arange(count), positions] = best[positions, choices]
    return found


class Goals(Protocol):
    """What a text search minimises for several prompts at once; see `des.attacks.objectives.TextGoals`."""

    def losses(self, texts: Sequence[str], which: Sequence[int]) -> Tensor:
        """The loss of each text for prompt number `which[i]`."""

    def gradient(self, texts: Sequence[str], slots: slice) -> Tensor:
        """The gradient [prompts, slots, vocabulary] of each prompt's current text."""


class TokenPrompt(NamedTuple):
    """A prompt as a search found it: its text, the ids of its tokens, and its loss."""

    text: str
    ids: list[int]
    loss: float


def coordinate_search(
    goals: Goals, vocabulary: Vocabulary, length: int, steps: int, count: int, top: int, generators: Sequence[torch.Generator]
) -> Iterator[list[TokenPrompt]]:
    """Search a prompt of `length` tokens for each generator, by greedy coordinate gradient from random tokens.

    Yields the best prompts so far after each step. In each step the best of `count` candidates that survive decoding and encoding, and
    are allowed, becomes the current prompt.
    """
    vocabulary.room(length)
    slots = slice(len(vocabulary.before), len(vocabulary.before) + length)
    ids = [vocabulary.random(length, generator) for generator in generators]
    texts = vocabulary.texts([each.tolist() for each in ids])
    losses = goals.losses(texts, range(len(ids))).tolist()
    best = [TokenPrompt(text, each.tolist(), loss) for text, each, loss in zip(texts, ids, losses, strict=True)]
    for _ in range(steps):
        gradient = goals.gradient(texts, slots)
        tried = [
            coordinate_candidates(gradient[i], ids[i], vocabulary.usable, count, top, generators[i]) for i in range(len(ids))
        ]
        found = [vocabulary.surviving(each.tolist()) for each in tried]
        flat = [(i, text) for i, each in enumerate(found) for text in each if text is not None]
        values = goals.losses([text for _, text in flat], [i for i, _ in flat]) if flat else torch.zeros(0)
        at = 0
        for i, each in enumerate(found):
            kept = [j for j, text in enumerate(each) if text is not None]
            mine, at = values[at : at + len(kept)], at + len(kept)
            chosen = best_allowed(vocabulary, [each[j] for j in kept], mine)
            if chosen is not None:
                ids[i], texts[i] = tried[i][kept[chosen]], each[kept[chosen]]
                if mine[chosen] < best[i].loss:
                    best[i] = TokenPrompt(texts[i], ids[i].tolist(), mine[chosen].item())
        yield list(best)


# ---------------------------------------------------------------- probability simplex


def project_to_simplex(rows: Tensor) -> Tensor:
    """Return the nearest point of the probability simplex to each row [..., n], in Euclidean distance.

    Source: J. Duchi et al., ICML 2008, figure 1.
    """
    ordered = rows.sort(dim=-1, descending=True).values
    counts = torch.arange(1, rows.shape[-1] + 1, device=rows.device, dtype=rows.dtype)
    shifts = (ordered.cumsum(-1) - 1) / counts
    last = (ordered > shifts).sum(-1, keepdim=True) - 1
    return (rows - shifts.gather(-1, last)).clamp_min(0)


class SimplexPrompts:
    """A distribution over usable tokens for each of k positions of n prompts, optimised by Adam and projected onto the simplex."""

    def __init__(self, shape: tuple[int, int], usable: Tensor, learning_rate: float, weight_decay: float, device: torch.device):
        """Start with uniform distributions; `shape` is (n, k)."""
        self.tokens = usable.nonzero()[:, 0]  # the token id of each column
        count = len(self.tokens)
        self.rows = torch.full((*shape, count), 1 / count, device=device, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.rows], lr=learning_rate, weight_decay=weight_decay)

    def draw(self, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Draw one token of each position: one-hot rows [n, k, columns] with a straight-through gradient, and ids [n, k]."""
        shares = self.rows.detach().cpu().double()
        drawn = torch.stack([each.multinomial(1, generator=by)[:, 0] for each, by in zip(shares, generators, strict=True)])
        hard = one_hot(drawn, len(self.tokens)).to(self.rows)
        return hard + self.rows - self.rows.detach(), self.tokens[drawn]

    def step(self, loss: Tensor) -> None:
        """Take a step on a loss of `draw`'s rows, with their gradient clipped to [-1, 1], and project the rows onto the simplex."""
        self.optimizer.zero_grad()
        loss.backward()
        self.rows.grad.clamp_(-1, 1)
        self.optimizer.step()
        with torch.no_grad():
            self.rows.copy_(project_to_simplex(self.rows))

    def best(self) -> Tensor:
        """Return the most probable token of each position, ids [n, k]."""
        return self.tokens[self.rows.argmax(-1).cpu()]


# ---------------------------------------------------------------- nearest tokens


def nearest_tokens(vectors: Tensor, table: Tensor, usable: Tensor) -> Tensor:
    """Return the ids [k] of the usable tokens whose embeddings have the highest cosine to `vectors` [k, hidden]."""
    cosines = normalize(vectors.detach().float(), dim=-1) @ normalize(table.float(), dim=-1).T
    return cosines.masked_fill(~usable.to(cosines.device), -float("inf")).argmax(-1).cpu()


# ---------------------------------------------------------------- genetic


def genetic_step(
    population: Tensor, losses: Tensor, usable: Tensor, generator: torch.Generator, crossover: float, mutation: float
) -> Tensor:
    """Return the next generation [P, k] of a population of token ids [P, k].

    The best half is kept. Random pairs of it, as many as fill the other half, have two children each: with probability `crossover`
    they swap their ends after one random cut, otherwise they equal their parents. With probability `mutation` a child then gets a
    random usable token at one random position. Source: Ring-A-Bell.
    """
    size, length = population.shape
    kept = population[losses.argsort(stable=True)[: (size + 1) // 2]]
    among = usable.nonzero()[:, 0]

    def draw(high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator)

    pairs = -(-(size - len(kept)) // 2)
    mothers, fathers = kept[draw(len(kept), pairs)], kept[draw(len(kept), pairs)]
    cuts = draw(max(length - 1, 1), pairs) + 1
    swaps = torch.rand(pairs, generator=generator) < crossover
    behind = (torch.arange(length) >= cuts[:, None]) & swaps[:, None]
    children = torch.cat([torch.where(behind, fathers, mothers), torch.where(behind, mothers, fathers)])[: size - len(kept)]
    mutated = torch.rand(len(children), generator=generator) < mutation
    positions, tokens = draw(length, len(children)), among[draw(len(among), len(children))]
    at = mutated[:, None] & (torch.arange(length) == positions[:, None])
    return torch.cat([kept, torch.where(at, tokens[:, None], children)])


def genetic_search(
    goals: Goals,
    vocabulary: Vocabulary,
    length: int,
    generations: int,
    population: int,
    crossover: float,
    mutation: float,
    generators: Sequence[torch.Generator],
) -> list[TokenPrompt]:
    """Search a prompt of `length` tokens for each generator with a genetic algorithm from random tokens, without gradients.

    Returns the best prompt ever whose text survives decoding and encoding and is allowed.
    """
    vocabulary.room(length)
    among = vocabulary.usable.nonzero()[:, 0]
    groups = [
        torch.cat(
            [vocabulary.random(length, by)[None], among[torch.randint(len(among), (population - 1, length), generator=by)]]
        )
        for by in generators
    ]
    best: list[TokenPrompt | None] = [None] * len(generators)
    for generation in range(generations + 1):
        texts = vocabulary.texts(torch.cat(groups).tolist())
        losses = goals.losses(texts, [i for i in range(len(groups)) for _ in range(population)]).reshape(
            len(groups), population
        )
        for i, group in enumerate(groups):
            best[i] = _better(vocabulary, group, losses[i], best[i], checked=population if generation == 0 else 3)
            if generation < generations:
                groups[i] = genetic_step(group, losses[i], vocabulary.usable, generators[i], crossover, mutation)
    return best


def _better(
    vocabulary: Vocabulary, group: Tensor, losses: Tensor, best: TokenPrompt | None, checked: int
) -> TokenPrompt | None:
    """Return the best allowed prompt among the `checked` ones of lowest loss in a population, or `best` if that is better."""
    for i in losses.argsort(stable=True)[:checked].tolist():
        if best is not None and losses[i] >= best.loss:
            return best
        text = vocabulary.surviving([group[i].tolist()])[0]
        if text is not None and vocabulary.allowed(text):
            return TokenPrompt(text, group[i].tolist(), losses[i].item())
    return best
