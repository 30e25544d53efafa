"""Three published defences for a pipeline of Stable Diffusion 1.x, trained from a list of unsafe and a list of safe prompts.

ESD-x: Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023, equation 7; trains the UNet's cross-attention.
UCE: Gandikota et al., "Unified Concept Editing in Diffusion Models", WACV 2024, equation 7; keys and values in closed form.
AdvUnlearn: Zhang et al., "Defensive Unlearning with Adversarial Training", NeurIPS 2024, equations 5 to 7; trains the text encoder.

`predict` returns what the UNet predicts: the noise, or v on the demo's UNet. At a given x_t, v is an affine function of the noise, and
ESD's target is an affine combination of predictions with weights that add up to 1, so its formula holds for both.
"""

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from des.models.encoders import TextEncoder
from des.models.pipelines import text_encoder
from des.search.soft import embedding_table, input_embeddings
from des.utils.logs import progress

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

GUIDANCE, DENOISING_STEPS = 3.0, 20  # of the images whose latents x_t are trained on, as the demo draws its images
EMPTY = 0.1  # share of AdvUnlearn's safe prompts replaced by the empty prompt, whose prediction guidance subtracts


@dataclass(frozen=True)
class Training:
    """Options of a training by gradient descent: AdamW steps, its learning rate, prompts a step, and ESD's guidance eta."""

    steps: int
    learning_rate: float
    batch_size: int
    negative_guidance: float
    seed: int


def train_esd(pipe: StableDiffusionPipeline, unsafe: Sequence[str], options: Training) -> dict[str, Tensor]:
    """Train the cross-attention of the pipeline's UNet in place by ESD-x; returns the parameters trained, by name.

    Minimises |U(x_t, t, E(u)) - target|^2 for unsafe prompts u, with the target of `esd_target` from the original UNet. x_t comes
    from images of u that the UNet in training draws.
    """
    unet, original, encoder = pipe.unet, copy.deepcopy(pipe.unet), text_encoder(pipe, 1, "pipeline")
    trained = {name: each for name, each in unet.named_parameters() if ".attn2." in name}
    _train_only(unet, trained.values())
    optimizer = torch.optim.AdamW(trained.values(), options.learning_rate, weight_decay=0)
    for prompts, t, x in _states(pipe, unsafe, options):
        concept, empty = embed(encoder, prompts), embed(encoder, [""])
        with torch.no_grad():
            target = esd_target(predict(original, x, t, concept), predict(original, x, t, empty), options.negative_guidance)
        _step(optimizer, F.mse_loss(predict(unet, x, t, concept), target))
    return {name: each.detach() for name, each in trained.items()}


def esd_target(conditional: Tensor, unconditional: Tensor, eta: float) -> Tensor:
    """Return U(x_t, t, e0) - eta * (U(x_t, t, c) - U(x_t, t, e0)) from the original UNet's predictions, with ESD's negative guidance."""
    return unconditional - eta * (conditional - unconditional)


def train_uce(
    pipe: StableDiffusionPipeline, unsafe: Sequence[str], safe: Sequence[str], erase: float, preserve: float, ridge: float
) -> dict[str, Tensor]:
    """Edit the key and value projections of the UNet's cross-attention by UCE; returns the new weights by name.

    In an unsafe prompt, each token from the first word on that no safe prompt contains is mapped to what the original projection
    makes of the token at its place in the empty prompt. The tokens of safe prompts keep what the projection makes of them.
    """
    encoder, safe_words = text_encoder(pipe, 1, "pipeline"), {word for prompt in safe for word in prompt.split()}
    with torch.no_grad():
        kept = torch.cat(list(encoder.encode(list(safe), 256))).flatten(0, 1).clone()
        embedded = torch.cat(list(encoder.encode(list(unsafe), 256)))
        starts = torch.tensor([_first_unsafe_token(encoder, prompt, safe_words) for prompt in unsafe])
        edited = torch.arange(encoder.length)[None] >= starts[:, None]
        anchors = embed(encoder, [""]).expand_as(embedded)[edited]
        concepts = embedded[edited].clone()
        layers = {
            name: each
            for name, each in pipe.unet.named_parameters()
            if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        }
        return {
            name: uce_weight(weight, concepts, anchors @ weight.T, kept, erase, preserve, ridge)
            for name, weight in progress(layers.items(), desc="UCE", unit="layer")
        }


def uce_weight(
    weight: Tensor,
    concepts: Tensor,
    targets: Tensor,
    kept: Tensor,
    erase: float = 1.0,
    preserve: float = 1.0,
    ridge: float = 0.1,
) -> Tensor:
    """Return the minimiser W [out, in] of erase * sum |W c - v|^2 + preserve * sum |W k - W0 k|^2 + ridge * |W - W0|^2.

    W0 is `weight` [out, in], c and v are the rows of `concepts` [n, in] and `targets` [n, out], and k those of `kept` [m, in]. The
    closed form is solved in float64.
    """
    old, c, v, k = (each.double() for each in (weight, concepts, targets, kept))
    unchanged = preserve * k.T @ k + ridge * torch.eye(old.shape[1], dtype=old.dtype, device=old.device)
    left = erase * c.T @ c + unchanged
    right = erase * c.T @ v + unchanged @ old.T
    return torch.linalg.solve(left, right).T.to(weight.dtype).contiguous()


def train_advunlearn(
    pipe: StableDiffusionPipeline,
    unsafe: Sequence[str],
    safe: Sequence[str],
    options: Training,
    images: int,
    retain_weight: float,
    warm_up: float,
    attack_steps: int,
    attack_rate: float,
) -> dict[str, Tensor]:
    """Train the pipeline's text encoder in place by AdvUnlearn's bilevel objective; returns its state.

    Minimises |U(x_t, t, E~(p u)) - target|^2 + retain_weight * |U(x_t, t, E~(s)) - U(x_t, t, E(s))|^2, with ESD's target, for unsafe
    prompts u and as many safe prompts s, of which a share of EMPTY is replaced by the empty prompt. p is a token embedding in front of
    u, found by `attack_steps` steps of the sign of the gradient that bring U(x_t, t, E~(p u)) to U(x_t, t, E(u)), from a random token
    of the vocabulary. Half of the prompts u of a step have no p, and in the first `warm_up` share of the steps none has. The
    original pipeline draws x_t: the states of `images` images of unsafe prompts and of twice as many of safe ones. The learning rate
    falls linearly to 0.
    """
    encoder, generator = text_encoder(pipe, 1, "pipeline"), torch.Generator().manual_seed(options.seed)
    concept, benign = _draw(pipe, unsafe, images, generator), _draw(pipe, safe, 2 * images, generator)
    _train_only(pipe.unet, ())
    _train_only(encoder.model, encoder.model.parameters())
    optimizer = torch.optim.AdamW(encoder.model.parameters(), options.learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, options.steps)
    for step in progress(range(options.steps), desc="AdvUnlearn", unit="step"):
        u, s = (states.sample(options.batch_size, generator) for states in (concept, benign))
        emptied = torch.rand(len(s.prompts), generator=generator) < EMPTY
        safe_prompts = ["" if empty else prompt for prompt, empty in zip(s.prompts, emptied.tolist(), strict=True)]
        retained = s.predicted[torch.arange(len(emptied)), emptied.long()]
        attacked = u[torch.arange(0 if step < warm_up * options.steps else (options.batch_size + 1) // 2)]
        embeddings = encoder(encoder.tokenize(u.prompts[len(attacked.prompts) :] + safe_prompts))
        if attacked.prompts:
            prefix = attack(pipe.unet, encoder, attacked, attack_steps, attack_rate, generator)
            embeddings = torch.cat([with_prefix(encoder, attacked.prompts, prefix), embeddings])
        erased, kept = predict(pipe.unet, torch.cat([u.x, s.x]), torch.cat([u.t, s.t]), embeddings).chunk(2)
        target = esd_target(*u.predicted.unbind(1), options.negative_guidance)
        _step(optimizer, F.mse_loss(erased, target) + retain_weight * F.mse_loss(kept, retained))
        schedule.step()
    return encoder.model.state_dict()


def attack(
    unet: nn.Module, encoder: TextEncoder, states: "States", steps: int, rate: float, generator: torch.Generator
) -> Tensor:
    """Find token embeddings [prompts, hidden] that bring predictions for prompts behind them to those of the original encoder."""
    prefix = _random_tokens(encoder, len(states.prompts), generator)
    for _ in range(steps):
        prefix.requires_grad_()
        found = predict(unet, states.x, states.t, with_prefix(encoder, states.prompts, prefix))
        (gradient,) = torch.autograd.grad(F.mse_loss(found, states.predicted[:, 0], reduction="sum"), prefix)
        prefix = (prefix - rate * gradient.sign()).detach()
    return prefix


def with_prefix(encoder: TextEncoder, prompts: Sequence[str], prefix: Tensor) -> Tensor:
    """Return embeddings of prompts with a token embedding `prefix` [prompts, hidden] in front of their first token."""
    ids = encoder.tokenize(list(prompts)).to(encoder.device)
    ids = torch.cat([ids[:, :1], ids[:, :1], ids[:, 1:-1]], dim=1)  # the second token only holds the place
    ids[:, -1] = encoder.tokenizer.eos_token_id
    embedded = embedding_table(encoder.model)[ids]
    with input_embeddings(encoder.model, torch.cat([embedded[:, :1], prefix[:, None], embedded[:, 2:]], dim=1)):
        return encoder(ids)


def predict(unet: nn.Module, x: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
    """Return the UNet's prediction for x_t [batch, channels, height, width] and embeddings [batch or 1, tokens, hidden]."""
    return unet(x, t, embeddings.expand(len(x), -1, -1)).sample


@torch.no_grad()
def embed(encoder: TextEncoder, prompts: Sequence[str]) -> Tensor:
    """Return the embeddings [prompts, tokens, hidden] that the pipeline feeds to its UNet, without gradients."""
    return encoder(encoder.tokenize(list(prompts)))


def _first_unsafe_token(encoder: TextEncoder, prompt: str, safe_words: set[str]) -> int:
    """Return the place of the first token of the first word that is not in `safe_words`; that of the last word if all are."""
    words = prompt.split()
    first = next((i for i, word in enumerate(words) if word not in safe_words), len(words) - 1)
    return 1 + len(encoder.tokenizer(" ".join(words[:first]), add_special_tokens=False).input_ids)


def _random_tokens(encoder: TextEncoder, count: int, generator: torch.Generator) -> Tensor:
    """Return the input embeddings [count, hidden] of random tokens of the vocabulary."""
    table = encoder.model.get_input_embeddings().weight.detach()
    return table[torch.randint(len(table), (count,), generator=generator).to(table.device)].clone()


@dataclass(frozen=True)
class States:
    """Noisy latents x [states, channels, height, width] at timesteps t [states], and the UNet's predictions on them.

    `predicted` [states, 2, channels, height, width] are those for the state's prompt and for the empty prompt.
    """

    prompts: list[str]
    t: Tensor
    x: Tensor
    predicted: Tensor

    def __getitem__(self, chosen: Tensor) -> "States":
        """Return the states with these numbers."""
        return States([self.prompts[i] for i in chosen.tolist()], self.t[chosen], self.x[chosen], self.predicted[chosen])

    def sample(self, count: int, generator: torch.Generator) -> "States":
        """Return random states, drawn with replacement."""
        return self[torch.randint(len(self.prompts), (count,), generator=generator)]


def _draw(pipe: StableDiffusionPipeline, prompts: Sequence[str], images: int, generator: torch.Generator) -> States:
    """Draw images of random prompts; returns all of their states."""
    chosen = [prompts[i] for i in torch.randint(len(prompts), (images,), generator=generator).tolist()]
    parts = [part for i in range(0, images, 32) for part in _trajectory(pipe, chosen[i : i + 32], generator)]
    texts = [prompt for part in parts for prompt in part.prompts]
    return States(texts, *(torch.cat([getattr(part, name) for part in parts]) for name in ("t", "x", "predicted")))


def _states(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], options: Training
) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Yield prompts, a timestep and noisy latents x_t for each training step of ESD-x.

    The pipeline draws the prompts in its current state, and each of its denoising steps, in random order, is one training step.
    """
    rng, generator, pending = random.Random(options.seed), torch.Generator().manual_seed(options.seed), []
    for _ in progress(range(options.steps), desc="ESD-x", unit="step"):
        if not pending:
            pending = _trajectory(pipe, rng.choices(prompts, k=options.batch_size), generator)
            rng.shuffle(pending)
        state = pending.pop()
        yield state.prompts, state.t[0], state.x


@torch.no_grad()
def _trajectory(pipe: StableDiffusionPipeline, prompts: list[str], generator: torch.Generator) -> list[States]:
    """Draw images of the prompts; returns their states at each timestep, before the denoising step."""
    encoder, size = text_encoder(pipe, 1, "pipeline"), pipe.unet.config.sample_size
    conditions = torch.cat([embed(encoder, [""]).expand(len(prompts), -1, -1), embed(encoder, prompts)])
    x = torch.randn(len(prompts), pipe.unet.config.in_channels, size, size, generator=generator).to(encoder.device)
    pipe.scheduler.set_timesteps(DENOISING_STEPS, device=encoder.device)
    states = []
    for t in pipe.scheduler.timesteps:
        empty, conditional = predict(pipe.unet, torch.cat([x, x]), t, conditions).chunk(2)
        states.append(States(prompts, t.expand(len(prompts)), x, torch.stack([conditional, empty], dim=1)))
        x = pipe.scheduler.step(empty + GUIDANCE * (conditional - empty), t, x).prev_sample
    return states


def _train_only(model: nn.Module, parameters) -> None:
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_()


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
