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
    for prompts, t, x in _states(pipe, (unsafe,), options, "ESD-x"):
        concept, empty = embed(encoder, prompts), embed(encoder, [""])
        loss = F.mse_loss(predict(unet, x, t, concept), esd_target(original, x, t, concept, empty, options.negative_guidance))
        _step(optimizer, loss)
    return {name: each.detach() for name, each in trained.items()}


@torch.no_grad()
def esd_target(original: nn.Module, x: Tensor, t: Tensor, concept: Tensor, empty: Tensor, eta: float) -> Tensor:
    """Return U(x_t, t, e0) - eta * (U(x_t, t, c) - U(x_t, t, e0)) of the original UNet, with ESD's negative guidance eta."""
    unconditional = predict(original, x, t, empty)
    return unconditional - eta * (predict(original, x, t, concept) - unconditional)


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
    retain_weight: float,
    attack_steps: int,
    attack_rate: float,
) -> dict[str, Tensor]:
    """Train the pipeline's text encoder in place by AdvUnlearn's bilevel objective; returns its state.

    Minimises |U(x_t, t, E~(p u)) - target|^2 + retain_weight * |U(x_t, t, E~(s)) - U(x_t, t, E(s))|^2, with ESD's target, for unsafe
    prompts u and safe prompts s. p is a token embedding in front of u, found by `attack_steps` steps of the sign of the gradient that
    bring U(x_t, t, E~(p u)) to U(x_t, t, E(u)), from a random token of the vocabulary.
    """
    encoder, original = text_encoder(pipe, 1, "pipeline"), copy.deepcopy(pipe.text_encoder)
    frozen = copy.copy(encoder)
    frozen.model = original
    _train_only(pipe.unet, ())
    _train_only(encoder.model, encoder.model.parameters())
    optimizer = torch.optim.AdamW(encoder.model.parameters(), options.learning_rate, weight_decay=0)
    generator = torch.Generator().manual_seed(options.seed)
    for prompts, t, x in _states(pipe, (unsafe, safe), options, "AdvUnlearn"):
        n = len(prompts) // 2
        concept, safe_embedding, empty = embed(frozen, prompts[:n]), embed(frozen, prompts[n:]), embed(frozen, [""])
        with torch.no_grad():
            wanted, retained = predict(pipe.unet, x[:n], t, concept), predict(pipe.unet, x[n:], t, safe_embedding)
        prefix = _random_tokens(encoder, n, generator)
        for _ in range(attack_steps):
            prefix.requires_grad_()
            error = F.mse_loss(predict(pipe.unet, x[:n], t, with_prefix(encoder, prompts[:n], prefix)), wanted, reduction="sum")
            (gradient,) = torch.autograd.grad(error, prefix)
            prefix = (prefix - attack_rate * gradient.sign()).detach()
        embeddings = torch.cat([with_prefix(encoder, prompts[:n], prefix), encoder(encoder.tokenize(prompts[n:]))])
        erased, kept = predict(pipe.unet, x, t, embeddings).chunk(2)
        target = esd_target(pipe.unet, x[:n], t, concept, empty, options.negative_guidance)
        _step(optimizer, F.mse_loss(erased, target) + retain_weight * F.mse_loss(kept, retained))
    return encoder.model.state_dict()


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


def _states(
    pipe: StableDiffusionPipeline, lists: Sequence[Sequence[str]], options: Training, desc: str
) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Yield prompts, a timestep and noisy latents x_t for each training step; each of `lists` gives `batch_size` of the prompts.

    The pipeline draws the prompts in its current state, and each of its denoising steps, in random order, is one training step.
    """
    rng, generator = random.Random(options.seed), torch.Generator().manual_seed(options.seed)
    encoder, pending = text_encoder(pipe, 1, "pipeline"), []
    for _ in progress(range(options.steps), desc=desc, unit="step"):
        if not pending:
            prompts = [prompt for each in lists for prompt in rng.choices(each, k=options.batch_size)]
            pending = [(prompts, *state) for state in _trajectory(pipe, encoder, prompts, generator)]
            rng.shuffle(pending)
        yield pending.pop()


@torch.no_grad()
def _trajectory(
    pipe: StableDiffusionPipeline, encoder: TextEncoder, prompts: list[str], generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Draw images of the prompts; returns each timestep with the latents before it."""
    size, device = pipe.unet.config.sample_size, encoder.device
    conditions = torch.cat([embed(encoder, [""]).expand(len(prompts), -1, -1), embed(encoder, prompts)])
    x = torch.randn(len(prompts), pipe.unet.config.in_channels, size, size, generator=generator).to(device)
    pipe.scheduler.set_timesteps(DENOISING_STEPS, device=device)
    states = []
    for t in pipe.scheduler.timesteps:
        states.append((t, x))
        empty, conditional = predict(pipe.unet, torch.cat([x, x]), t, conditions).chunk(2)
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
