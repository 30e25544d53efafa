"""Concept inversion: input embeddings learned for all prompts of a cell together, by the denoiser's loss or by embeddings."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from des.attacks.cells import Cell
from des.attacks.objectives import Denoiser
from des.attacks.records import Found
from des.attacks.words import rows_to_attack, without_words
from des.models.encoders import TextEncoder, spread
from des.models.learned_tokens import encoder_names, placeholders, read_learned_tokens, save_learned_tokens, set_tokens
from des.models.pipelines import text_encoder
from des.search.soft import embedding_table, input_embeddings, learn_vectors, vocabulary_norm, with_vectors
from des.search.tokens import TokenPrompt, room_for, seeded
from des.utils.errors import UserError
from des.utils.locks import locked
from des.utils.logs import logger

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

Loss = Callable[[Tensor], Tensor]  # of vectors [tokens, hidden]


@dataclass
class Inversion:
    """Learns tokens for a cell, once per restart, and puts them into its prompts: a search of `des.attacks.run.Attack`."""

    cell: Cell
    tokens: int
    objective: str
    max_norm: str | float
    learning_rate: float
    train_batch_size: int
    accumulation: int
    num_images: int
    encoders: list[int] | None
    steps: int
    seed: int

    def __post_init__(self) -> None:
        """Choose the rows to learn from, the same ones for all processes that share the list."""
        self.path = self.cell.folder / f"{self.cell.name}.safetensors"
        allowed = rows_to_attack(self.cell.targets, self.cell.judge.refused)
        self.rows = [allowed[i] for i in spread(len(allowed), self.num_images).tolist()]
        self.denoiser = Denoiser(self.cell.pipe) if self.objective == "diffusion" else None
        self.losses: dict[int, float] = {}
        searched = self.cell.encoders(self.encoders)[0]
        self.room = {each.tokenizer: room_for(self.tokens, each.tokenizer, each.length) for each in searched}

    def __call__(self, rows: list[int], restart: int) -> list[Found]:
        """Draw and judge the prompts of `rows` with the tokens of a restart, which are learned first."""
        if restart not in self.losses:
            self.losses[restart] = self.learned(restart)
        texts = [self.carry(row, restart) for row in rows]
        ids = self.cell.pipe.tokenizer(texts, add_special_tokens=False).input_ids
        found = [TokenPrompt(text, each, self.losses[restart]) for text, each in zip(texts, ids, strict=True)]
        return self.cell.judged(rows, found, 0)

    def carry(self, row: int, restart: int) -> str:
        """Return a row's prompt with the learned tokens: before it or, without the concept's names, in the place of the first one.

        They are put before the prompt, too, if a text encoder would not read all of them in that place.
        """
        names = placeholders(restart, self.tokens)
        inserted = " ".join(names)
        text = without_words(self.cell.targets[row], self.cell.words, inserted)
        return text if inserted in text and self.are_read(names, text) else f"{inserted} {self.cell.starts[row]}"

    def are_read(self, names: list[str], text: str) -> bool:
        """Whether all searched text encoders read all of the tokens `names` in a text, which they may truncate."""
        read = (
            (each, each(text, add_special_tokens=False, verbose=False).input_ids[:room]) for each, room in self.room.items()
        )
        return all(set(each.convert_tokens_to_ids(names)) <= set(ids) for each, ids in read)

    def learned(self, restart: int) -> float:
        """Learn the tokens of a restart, or read them if an earlier run or another process did; returns their loss."""
        names = placeholders(restart, self.tokens)
        with locked(self.cell.folder / f".{self.cell.name}.lock", "learned tokens", wait=True):
            known, vectors, losses = self.read()
            set_tokens(self.cell.pipe, known, vectors) if known else None
            if not set(names) <= set(known):
                new, loss = self.learn(names, restart)
                known, losses = known + names, losses | {str(restart): loss}
                vectors = {name: torch.cat([vectors[name], each]) if name in vectors else each for name, each in new.items()}
                digests = {name: self.cell.records.settings[f"{name}_sha256"] for name in vectors}
                save_learned_tokens(self.path, known, vectors, digests, {"stamp": self.cell.records.stamp, "losses": losses})
        return losses[str(restart)]

    def read(self) -> tuple[list[str], dict[str, Tensor], dict[str, float]]:
        """Read the tokens of earlier restarts, their vectors and losses; UserError if they have other settings."""
        if not self.path.is_file():
            return [], {}, {}
        names, vectors, _, notes = read_learned_tokens(self.path)
        if notes.get("stamp") != self.cell.records.stamp:
            raise UserError(
                f"{self.path} has tokens that were learned with other settings; choose another --out or --control_dir"
            )
        return names, vectors, notes["losses"]

    def learn(self, names: list[str], restart: int) -> tuple[dict[str, Tensor], float]:
        """Learn vectors [tokens, hidden] for each searched text encoder; returns them and the mean loss of the last steps.

        In the other encoders the tokens keep the mean embedding of the vocabulary.
        """
        pipe, losses = self.cell.pipe, []
        ids = set_tokens(pipe, names)
        vectors = {
            name: embedding_table(text_encoder(pipe, i).model)[ids[name]].clone() for name, i in encoder_names(pipe).items()
        }
        for encoder in self.cell.encoders(self.encoders)[0]:
            logger.info("%s: learning %d tokens of %s in %d steps", self.cell.name, self.tokens, encoder.subfolder, self.steps)
            steps = list(self.learning(encoder, ids[encoder.subfolder], restart))
            vectors[encoder.subfolder], last = steps[-1][0], [loss for _, loss in steps[-20:]]
            losses.append(sum(last) / len(last))
        set_tokens(pipe, names, vectors)
        return {name: each.cpu() for name, each in vectors.items()}, sum(losses) / len(losses)

    def learning(self, encoder: TextEncoder, ids: list[int], restart: int) -> Iterator[tuple[Tensor, float]]:
        """Learn the vectors of the tokens `ids` of an encoder; yields them and the loss after each step, as `learn_vectors` does."""
        table = embedding_table(encoder.model)
        generator = seeded(self.seed, "concept inversion", restart, encoder.subfolder)
        count = encoder.tokenizer.convert_tokens_to_ids(placeholders(0, 1)[0])  # of tokens that are not learned
        start = table[torch.randint(count, (self.tokens,), generator=generator).to(table.device)]
        limit = {"none": None, "vocabulary": vocabulary_norm(encoder.model)}.get(self.max_norm, self.max_norm)
        make = self.diffusion_loss if self.objective == "diffusion" else self.embedding_loss
        loss = make(encoder, ids, restart, generator)
        return learn_vectors(start, loss, self.steps, self.learning_rate, limit, self.accumulation)

    def embed(self, encoder: TextEncoder, captions: Tensor, vectors: Tensor, ids: list[int]) -> Tensor:
        """Return the embeddings of caption ids [n, length] in which the learned tokens are `vectors`."""
        with input_embeddings(encoder.model, with_vectors(encoder.model, captions, vectors, ids)):
            return encoder(captions)

    def diffusion_loss(self, encoder: TextEncoder, ids: list[int], restart: int, generator: torch.Generator) -> Loss:
        """Return textual inversion's loss: the denoiser's error on images of the prompts, under the captions with the tokens."""
        images = self.cell.images.draw([(row, 1) for row in self.rows], [self.cell.targets[row] for row in self.rows])
        latents = self.denoiser.latents(images)
        captions = encoder.tokenize([self.carry(row, restart) for row in self.rows]).to(encoder.device)

        def loss(vectors: Tensor) -> Tensor:
            some = torch.randint(len(latents), (self.train_batch_size,), generator=generator)
            timesteps = torch.randint(self.denoiser.steps, (self.train_batch_size,), generator=generator).to(latents.device)
            clean = latents[some.to(latents.device)]
            noise = self.denoiser.noise(clean, generator)
            embeddings = self.embed(encoder, captions[some.to(captions.device)], vectors, ids)
            return self.denoiser.loss(clean, noise, timesteps, embeddings).mean()

        return loss

    def embedding_loss(self, encoder: TextEncoder, ids: list[int], restart: int, generator: torch.Generator) -> Loss:
        """Return the distance, 1 - cos over all tokens, of the captions' embeddings to the original encoder's of the prompts."""
        original = self.cell.encoder(self.cell.original, encoder.index)
        goals = torch.cat(list(original.encode([self.cell.targets[row] for row in self.rows], 64))).float().clone()
        captions = encoder.tokenize([self.carry(row, restart) for row in self.rows]).to(encoder.device)

        def loss(vectors: Tensor) -> Tensor:
            some = torch.randint(len(goals), (self.train_batch_size,), generator=generator).to(captions.device)
            embeddings = self.embed(encoder, captions[some], vectors, ids).float()
            return (1 - cosine_similarity(embeddings.flatten(1), goals[some].flatten(1))).mean()

        return loss
