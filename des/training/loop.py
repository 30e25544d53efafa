"""The DES training loop: pairs of prompts in, a protected encoder out."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from des.models.checkpoints import PROJECTION
from des.models.encoders import TextEncoder
from des.training import losses
from des.training.optimizers import make_optimizer
from des.training.pairs import SEEDS, Pairs
from des.training.run_state import Progress, RunState
from des.utils.errors import UserError
from des.utils.logs import logger, progress
from des.utils.processes import Processes

import torch
from torch import Tensor, nn

PARTS = ("sep", "sep_concept", "uen", "nen", "total")


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters; the defaults are the paper's for Stable Diffusion v1.x."""

    num_epochs: int = 2
    learning_rate: float = 1e-5
    lambda_safe: float = 0.3
    batch_size: int = 128
    ablation: Sequence[int] = (losses.SEP, losses.UEN, losses.NEN)
    concept_term: bool = True  # SEP's second term
    precision: str = "fp32"  # fp32 and tf32: weights in fp32; bf16: the same under autocast; bf16_weights: weights in bf16
    optimizer: str = "adamw"
    seed: int = 42


def trained_dtype(settings: Settings) -> torch.dtype:
    """The dtype of the weights while they are trained."""
    return torch.bfloat16 if settings.precision == "bf16_weights" else torch.float32


def make_trainable(model: nn.Module, settings: Settings) -> list[nn.Parameter]:
    """Give `model` the dtype it is trained in, and return what is trained: everything but a projection."""
    dtype = trained_dtype(settings)
    if model.dtype != dtype:
        model.to(dtype)
    model.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if name == PROJECTION:
            parameter.requires_grad_(False)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(
    encoder: TextEncoder,
    pairs: Pairs,
    concept: losses.Concept,
    concept_ids: Tensor,
    settings: Settings,
    processes: Processes,
    on_step: Callable[[dict], None],
    on_epoch: Callable[[int, TextEncoder], Path | None],
    states: RunState | None = None,
) -> None:
    """Train `encoder` in place with AdamW at a constant rate (paper, section 4; losses in `des/training/losses.py`).

    `concept_ids` are the concept prompts' token ids [concepts, tokens]. `on_step` gets each step's losses, `on_epoch` each epoch's number
    and the encoder, whose model is wrapped where several processes train it, and returns the checkpoint that it wrote, if any.
    `states` says where training starts, and keeps its state. Raises UserError when a loss is not finite, before the weights are
    touched by it, and when an epoch's weights are not, before anything is written.
    """
    torch.manual_seed(settings.seed + processes.rank)  # dropout and stochastic rounding, where there is any
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.precision == "tf32"
    bare = encoder.model
    optimizer = make_optimizer(settings.optimizer, make_trainable(bare, settings), settings.learning_rate)
    model, optimizer = processes.prepare(bare, optimizer)
    at = states.restore(bare, optimizer) if states else Progress()
    encoder = replace(encoder, model=model)
    steps = math.ceil(len(pairs) / settings.batch_size)
    bar = progress(None, total=settings.num_epochs * steps, initial=at.done, desc="training", unit="step")
    for epoch in range(at.done // steps + 1, settings.num_epochs + 1):
        model.train()
        batches = enumerate(pairs.batches(settings.batch_size, settings.seed, epoch), 1)
        for step, (unsafe, safe) in islice(batches, at.done % steps, None):
            parts = _losses(encoder, pairs, concept, concept_ids, settings, processes, unsafe, safe)
            together = processes.mean(torch.stack([parts[name].detach() for name in PARTS]))
            values = dict(zip(PARTS, together.tolist(), strict=True))
            if not math.isfinite(values["total"]):
                raise _diverged(f"the loss is {values['total']} in epoch {epoch}, step {step}", at)
            parts["total"].backward()
            at.add(values, len(unsafe))
            with processes.same_random_stream((settings.seed * 1_000_003 + at.done) % SEEDS):
                optimizer.step()
            optimizer.zero_grad()
            told = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            logger.debug("epoch %d, step %d/%d  %s", epoch, step, steps, told)
            on_step({"epoch": epoch, "step": at.done, **values})
            bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
            bar.update()
            if states and step < steps and states.due(at):
                _check_weights(model, f"epoch {epoch}, step {step}", at)
                states.save(at, bare, optimizer)
        means = "  ".join(f"{name} {value / len(pairs):.4f}" for name, value in at.sums.items())
        logger.info("epoch %d/%d  %s", epoch, settings.num_epochs, means)
        _check_weights(model, f"epoch {epoch}, step {steps}", at)
        model.eval()
        written = on_epoch(epoch, encoder)
        at = Progress(at.done, checkpoint=str(written) if written else at.checkpoint)
        if states and epoch < settings.num_epochs and (written or states.due(at)):
            states.save(at, bare, optimizer)
    bar.close()
    model.requires_grad_(False)


def _check_weights(model: nn.Module, where: str, at: Progress) -> None:
    """Raise UserError when a weight is not finite: a finite loss can have gradients that are not."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise _diverged(f"the weights are not finite after {where}", at)


def _diverged(what: str, at: Progress) -> UserError:
    good = f"the last good checkpoint is {at.checkpoint}" if at.checkpoint else "no checkpoint was written before"
    return UserError(f"{what}; try a lower --learning_rate or --precision fp32; {good}")


def _losses(
    encoder: TextEncoder,
    pairs: Pairs,
    concept: losses.Concept,
    concept_ids: Tensor,
    settings: Settings,
    processes: Processes,
    unsafe: Tensor,
    safe: Tensor,
) -> dict[str, Tensor]:
    """The losses of one batch's rows (this process's part), from one forward pass over unsafe, safe and concept prompts together."""
    share = processes.count * len(processes.share(unsafe)) / len(unsafe)
    if share:
        unsafe, safe = processes.share(unsafe), processes.share(safe)
    device = encoder.device
    ids = torch.cat([pairs.unsafe_ids[unsafe], pairs.safe_ids[safe], concept_ids])
    precision = torch.autocast(device.type, torch.bfloat16) if settings.precision == "bf16" else nullcontext()
    with precision:
        embeddings = encoder(ids)
    unsafe_now, safe_now, concept_now = embeddings.split([len(unsafe), len(safe), len(concept_ids)])
    target = concept.target(pairs.targets(unsafe).to(device, non_blocking=True))
    original = pairs.original(safe).to(device, non_blocking=True)
    chosen = settings.lambda_safe, settings.ablation, share, settings.concept_term
    return losses.total(unsafe_now, safe_now, concept_now, target, original, concept, *chosen)
