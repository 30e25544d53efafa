"""The DES training loop."""

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
from torch.optim import Optimizer

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
    """Cast `model` to the dtype it is trained in, and return its trainable parameters: all but those of a projection."""
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

    `concept_ids` are the token ids [concepts, tokens] of the concept prompts. `on_step` is called with the losses of each step.
    `on_epoch` is called with the number of each epoch and the encoder, whose model is wrapped if several processes train it; it
    returns the path of the checkpoint it wrote, or None. `states` restores the state of an interrupted run and saves new ones.
    Raises UserError if a loss is not finite, before the weights are updated, or if a weight is not, before a file is written.
    """
    bare = encoder.model
    model, optimizer = _prepare(bare, settings, processes)
    at = states.restore(bare, optimizer) if states else Progress()
    encoder = replace(encoder, model=model)
    steps = math.ceil(len(pairs) / settings.batch_size)
    bar = progress(None, total=settings.num_epochs * steps, initial=at.done, desc="training", unit="step")
    for epoch in range(at.done // steps + 1, settings.num_epochs + 1):
        model.train()
        batches = enumerate(pairs.batches(settings.batch_size, settings.seed, epoch), 1)
        for step, (unsafe, safe) in islice(batches, at.done % steps, None):
            parts = _losses(encoder, pairs, concept, concept_ids, settings, processes, unsafe, safe)
            values = _mean_losses(parts, processes)
            if not math.isfinite(values["total"]):
                raise _diverged(f"the loss is {values['total']} in epoch {epoch}, step {step}", at)
            at.add(values, len(unsafe))
            _update(parts["total"], optimizer, processes, settings.seed * 1_000_003 + at.done)
            logger.debug("epoch %d, step %d/%d  %s", epoch, step, steps, _show(values))
            on_step({"epoch": epoch, "step": at.done, **values})
            bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
            bar.update()
            if states and step < steps and states.due(at):
                _check_weights(model, f"epoch {epoch}, step {step}", at)
                states.save(at, bare, optimizer)
        means = {name: value / len(pairs) for name, value in at.sums.items()}
        logger.info("epoch %d/%d  %s", epoch, settings.num_epochs, _show(means))
        _check_weights(model, f"epoch {epoch}, step {steps}", at)
        model.eval()
        written = on_epoch(epoch, encoder)
        at = Progress(at.done, checkpoint=str(written) if written else at.checkpoint)
        if states and epoch < settings.num_epochs and (written or states.due(at)):
            states.save(at, bare, optimizer)
    bar.close()
    model.requires_grad_(False)


def _prepare(model: nn.Module, settings: Settings, processes: Processes) -> tuple[nn.Module, Optimizer]:
    """Seed the random generators, and return the model and its optimizer, wrapped if several processes train it."""
    torch.manual_seed(settings.seed + processes.rank)  # for dropout and stochastic rounding
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.precision == "tf32"
    optimizer = make_optimizer(settings.optimizer, make_trainable(model, settings), settings.learning_rate)
    return processes.prepare(model, optimizer)


def _mean_losses(parts: dict[str, Tensor], processes: Processes) -> dict[str, float]:
    """The losses of a step, averaged over the processes."""
    mean = processes.mean(torch.stack([parts[name].detach() for name in PARTS]))
    return dict(zip(PARTS, mean.tolist(), strict=True))


def _update(loss: Tensor, optimizer: Optimizer, processes: Processes, seed: int) -> None:
    """Take one optimizer step, with the random numbers of `seed` where several processes round weights stochastically."""
    loss.backward()
    with processes.same_random_stream(seed % SEEDS):
        optimizer.step()
    optimizer.zero_grad()


def _show(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())


def _check_weights(model: nn.Module, where: str, at: Progress) -> None:
    """Raise UserError if a weight is not finite: a finite loss can have gradients that are not."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise _diverged(f"the weights are not finite after {where}", at)


def _diverged(what: str, at: Progress) -> UserError:
    good = f"the last good checkpoint is {at.checkpoint}" if at.checkpoint else "no checkpoint was written yet"
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
    """The losses of this process's part of a batch, from one forward pass over its unsafe, safe and concept prompts."""
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
