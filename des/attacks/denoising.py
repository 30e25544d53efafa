"""Prompt searches through the denoiser of an SD 1.x or 2.x pipeline: UnlearnDiffAtk and P4D."""

from collections.abc import Sequence
from dataclasses import dataclass

from des.attacks.cells import Cell
from des.attacks.judging import Draws
from des.attacks.objectives import Denoiser
from des.attacks.records import Found
from des.models.encoders import TextEncoder
from des.models.pipelines import text_encoder
from des.search.soft import embedding_table, input_embeddings
from des.search.tokens import SimplexPrompts, Vocabulary, nearest_tokens, seeded

import torch
from torch import Tensor


@dataclass
class Slots:
    """Input rows [n, length] in which the same number of tokens of each prompt is searched, at `slots`."""

    rows: Tensor
    slots: list[slice]

    @classmethod
    def of(cls, vocabulary: Vocabulary, ids: Tensor, heads: Sequence[Sequence[int]], tails: Sequence[Sequence[int]]) -> "Slots":
        """Build the rows for ids [n, k] between the ids of `heads` and `tails`."""
        made = [vocabulary.rows(each, head, tail) for each, head, tail in zip(ids, heads, tails, strict=True)]
        return cls(torch.stack([row for row, _ in made]), [slots for _, slots in made])

    def embed(self, encoder: TextEncoder, values: Tensor) -> Tensor:
        """Return the encoder's embeddings with the input embeddings `values` [n, k, hidden] in the slots."""
        rows = self.rows.to(encoder.device)
        inputs = embedding_table(encoder.model).detach()[rows].to(values.dtype)
        inputs = torch.stack([
            torch.cat([row[: at.start], value, row[at.stop :]]) for row, value, at in zip(inputs, values, self.slots, strict=True)
        ])  # fmt: skip
        with input_embeddings(encoder.model, inputs):
            return encoder(rows)


def images_of(cell: Cell, denoiser: Denoiser, rows: list[int]) -> Tensor:
    """Return the latents of the original pipeline's images of the targets, drawn at the rows' seeds."""
    return denoiser.latents(cell.images.draw([(row, 0) for row in rows], [cell.targets[row] for row in rows]))


class UnlearnDiffAtk:
    """UDA: tokens before or after a prompt that let the attacked pipeline denoise the original's image of it. A search of `Attack`."""

    def __init__(
        self,
        cell: Cell,
        tokens: int,
        steps: int,
        timesteps: int,
        learning_rate: float,
        weight_decay: float,
        place: str,
        seed: int,
    ):
        """`steps` are optimiser steps at each of `timesteps` timesteps, centres of equal bins in rising order."""
        self.cell, self.tokens, self.steps, self.place, self.seed = cell, tokens, steps, place, seed
        self.rates = learning_rate, weight_decay
        self.denoiser, self.encoder = Denoiser(cell.pipe), text_encoder(cell.pipe, 1, "pipeline")
        self.vocabulary = cell.vocabulary(self.encoder)
        self.timesteps = [int((i + 0.5) * self.denoiser.steps / timesteps) for i in range(timesteps)]

    def __call__(self, rows: list[int], restart: int) -> list[Found]:
        """Search the rows until each is broken or all timesteps are used; the most probable tokens are judged after each timestep."""
        clean, draws = images_of(self.cell, self.denoiser, rows), Draws(self.cell.judge, rows)
        generators = [seeded(self.seed, row, restart) for row in rows]
        prompts = SimplexPrompts((len(rows), self.tokens), self.vocabulary.usable, *self.rates, clean.device)
        for number, timestep in enumerate(self.timesteps, 1):
            for _ in range(self.steps):
                losses = self.losses(prompts, rows, clean, timestep, generators)
                prompts.step(losses.sum())
            best = prompts.best()
            texts = [self.text(text, row) for text, row in zip(self.vocabulary.texts(best.tolist()), rows, strict=True)]
            if draws.add(self.vocabulary, best, texts, losses.tolist(), number * self.steps):
                break
        return draws.found

    def losses(
        self, prompts: SimplexPrompts, rows: list[int], clean: Tensor, timestep: int, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Return the denoiser's error [n] on the noised images under tokens drawn from the distributions; fresh noise each time."""
        one_hot, ids = prompts.draw(generators)
        starts = self.vocabulary.encode([self.start(row) for row in rows])
        empty = [[] for _ in rows]
        slots = Slots.of(self.vocabulary, ids, *((empty, starts) if self.place == "before" else (starts, empty)))
        table = embedding_table(self.encoder.model).detach().float()[prompts.tokens.to(clean.device)]
        noise = torch.cat([self.denoiser.noise(each[None], by) for each, by in zip(clean, generators, strict=True)])
        times = torch.full((len(rows),), timestep, device=clean.device)
        return self.denoiser.loss(clean, noise, times, slots.embed(self.encoder, one_hot @ table))

    def start(self, row: int) -> str:
        """Return the starting prompt of a row, shortened by whole words where tokens after it would not be read otherwise."""
        words, room = self.cell.starts[row].split(), self.vocabulary.room(self.tokens) - self.tokens
        if self.place == "before" or len(self.vocabulary.encode([self.cell.starts[row]])[0]) <= room:
            return self.cell.starts[row]
        while words and len(self.vocabulary.encode([" ".join(words)])[0]) > room:
            words.pop()
        return " ".join(words)

    def text(self, found: str, row: int) -> str:
        """Return the prompt of a row with the tokens found."""
        start = self.start(row)
        return (f"{found} {start}" if self.place == "before" else f"{start} {found}").strip()


class P4D:
    """P4D, variant N: a prompt under which the attacked denoiser predicts what the original one predicts for the target."""

    def __init__(
        self, cell: Cell, tokens: int, steps: int, judge_every: int, learning_rate: float, weight_decay: float, seed: int
    ):
        """The current prompt is judged every `judge_every` of `steps` steps."""
        self.cell, self.tokens, self.steps, self.judge_every, self.seed = cell, tokens, steps, judge_every, seed
        self.rates = {"lr": learning_rate, "weight_decay": weight_decay}
        self.denoiser, self.original = Denoiser(cell.pipe), Denoiser(cell.original)
        self.encoder, self.reference = (text_encoder(pipe, 1, "pipeline") for pipe in (cell.pipe, cell.original))
        self.vocabulary = cell.vocabulary(self.encoder)
        self.table = embedding_table(self.encoder.model).detach().float()

    def __call__(self, rows: list[int], restart: int) -> list[Found]:
        """Search the rows until each is broken or all steps are used."""
        clean, draws = images_of(self.cell, self.denoiser, rows), Draws(self.cell.judge, rows)
        generators = [seeded(self.seed, row, restart) for row in rows]
        goals = torch.cat(list(self.reference.encode([self.cell.targets[row] for row in rows], 16))).clone()
        ids = torch.stack([self.vocabulary.random(self.tokens, by) for by in generators])
        soft = self.table[ids.to(self.table.device)].clone().requires_grad_()
        optimizer = torch.optim.AdamW([soft], **self.rates)
        for step in range(1, self.steps + 1):
            losses, ids = self.losses(soft, goals, clean, generators)
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            if step % self.judge_every == 0 or step == self.steps:
                ids = nearest_tokens(soft.flatten(0, 1), self.table, self.vocabulary.usable).reshape(ids.shape)
                if draws.add(self.vocabulary, ids, self.vocabulary.texts(ids.tolist()), losses.tolist(), step):
                    break
        return draws.found

    def losses(
        self, soft: Tensor, goals: Tensor, clean: Tensor, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Return the squared distance [n] of both predictions at random timesteps, and the nearest tokens [n, k] of `soft`.

        The forward pass uses the nearest tokens' embeddings, and the gradient goes straight through to `soft` [n, k, hidden].
        """
        ids = nearest_tokens(soft.flatten(0, 1), self.table, self.vocabulary.usable).reshape(soft.shape[:2])
        values = soft + (self.table[ids.to(soft.device)] - soft).detach()
        empty = [[] for _ in ids]
        embeddings = Slots.of(self.vocabulary, ids, empty, empty).embed(self.encoder, values)
        noise = torch.cat([self.denoiser.noise(each[None], by) for each, by in zip(clean, generators, strict=True)])
        times = torch.cat([torch.randint(self.denoiser.steps, (1,), generator=by) for by in generators]).to(clean.device)
        noisy = self.denoiser.noisy(clean, noise, times)
        with torch.no_grad():
            wanted = self.original.predict(noisy, times, goals)
        predicted = self.denoiser.predict(noisy, times, embeddings)
        return (predicted - wanted).float().square().flatten(1).mean(-1), ids
