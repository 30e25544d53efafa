"""A training run: its inputs and targets, and the checkpoints, losses and states that it writes."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from des.models.checkpoints import (
    base_sketch,
    check_replaceable,
    checkpoint_path,
    plain_names,
    read_metadata,
    save_checkpoint,
)
from des.models.encoders import TextEncoder
from des.training import losses
from des.training.checks import refuse_untrained, unprotected, warn_unprotected
from des.training.codebook import DTYPES, Codebook, dtype_name, write_codebook
from des.training.loop import Settings, make_trainable, train, trained_dtype
from des.training.memory import Plan, make_plan
from des.training.pairs import Pairs
from des.training.run_state import RunState, open_metrics, refuse_other_runs
from des.training.summary import Summary, log_summary
from des.training.targets import find_targets
from des.training.trackers import tracking
from des.utils.errors import UserError
from des.utils.files import sha256_tensors
from des.utils.logs import logger
from des.utils.processes import Processes

import torch
from torch import Tensor


@dataclass(frozen=True)
class Output:
    """The folder of a training run, and how often it writes checkpoints and states there."""

    folder: Path
    save_format: str = "pt"  # one of des.utils.choices.CHECKPOINT_FORMATS
    save_every: int = 1  # epochs between checkpoints; the last epoch is always saved
    save_every_steps: int | None = None  # steps between states; None: only one with each checkpoint
    resume: bool = False
    report_to: Sequence[str] = ()  # names in des.utils.choices.TRACKERS

    def checkpoint(self, epoch: int) -> Path:
        """The file or folder of an epoch's checkpoint."""
        return checkpoint_path(self.folder / f"checkpoint-{epoch}", self.save_format)


def settings_for(dtype: torch.dtype, precision: str | None, optimizer: str | None, **given: Any) -> Settings:
    """The hyper-parameters `given`; a precision or optimizer of None becomes the default for an encoder of `dtype`.

    Raises UserError if the optimizer does not work with the precision.
    """
    precision = precision or ("bf16_weights" if dtype == torch.bfloat16 else "fp32")
    optimizer = optimizer or ("adamw_bf16_sr" if precision == "bf16_weights" else "adamw")
    if optimizer == "adamw_bf16_sr" and precision != "bf16_weights":
        raise UserError("--optimizer adamw_bf16_sr rounds bf16 weights; it needs --precision bf16_weights")
    if optimizer == "adamw" and precision == "bf16_weights":
        logger.warning("AdamW loses small updates of bf16 weights to rounding; the default, adamw_bf16_sr, does not")
    return Settings(precision=precision, optimizer=optimizer, **given)


def memory_plan(
    encoder: TextEncoder, settings: Settings, safe: int, unsafe: int, checkpointing: bool, processes: Processes
) -> Plan:
    """The memory plan of a training on `safe` and `unsafe` prompts (their numbers); `encoder` is on the meta device."""
    itemsize = DTYPES[dtype_name(encoder)][0].itemsize
    make_trainable(encoder.model, settings)
    return make_plan(
        encoder.model, lambda model, ids: replace(encoder, model=model)(ids), encoder.length, settings.batch_size,
        max(safe, unsafe), settings.num_epochs, safe, itemsize, settings.optimizer,
        torch.bfloat16 if settings.precision == "bf16" else None, checkpointing, processes.count, processes.sharded,
    )  # fmt: skip


def frozen_concept(encoder: TextEncoder, prompts: Sequence[str], scale: float, ratio: float | None = None) -> losses.Concept:
    """n = E(concept prompts) and e0 = E("") of the encoder before training; alpha is `scale`, or `ratio` * |n| if that is given."""
    prompts = [*prompts, ""]
    *concepts, e0 = next(encoder.encode(prompts, len(prompts))).float().clone()
    n = losses.joint(torch.stack(concepts))
    return losses.Concept(n, e0, scale if ratio is None else ratio * n.norm().item())


def shared_targets(
    processes: Processes,
    path: Path,
    codebook: Codebook,
    encoder: TextEncoder,
    unsafe: list[str],
    recompute: bool,
    **choice: Any,
) -> Tensor:
    """`find_targets` in several processes: the main one searches, the others read its file. `choice` is passed to `find_targets`."""
    if processes.is_main:
        find_targets(path, codebook, encoder, unsafe, recompute=recompute, **choice)
    processes.wait()
    return find_targets(path, codebook, encoder, unsafe, **choice)


def safe_originals(
    processes: Processes, folder: Path, codebook: Codebook, encoder: TextEncoder, safe: list[str], batch_size: int, made_by: Any
) -> Codebook:
    """A codebook with E(s) of every safe prompt: `codebook` if it has them all, else one that this call writes into `folder`."""
    if set(safe) <= set(codebook.prompts):
        return codebook
    if processes.is_main:
        logger.info("the codebook lacks some of the safe prompts; encoding them into %s", folder)
        write_codebook(folder, encoder, safe, batch_size=batch_size, made_by=made_by)
    processes.wait()
    return Codebook(folder, processes.hashes_files)


def training_inputs(
    encoder: TextEncoder,
    pairs: Pairs,
    concept: losses.Concept,
    concept_prompts: Sequence[str],
    settings: Settings,
    processes: Processes,
) -> dict[str, Any]:
    """Everything the trained weights depend on; --resume names the entries that changed."""
    devices = {parameter.device for parameter in encoder.model.parameters()}
    return asdict(settings) | {
        "ablation": " ".join(map(str, settings.ablation)),
        "concept_prompt": " + ".join(concept_prompts),
        "concept_guidance_scale": concept.alpha,
        "base encoder": encoder.base_sha256,
        "encoder configuration": encoder.identity["config"],
        "embedding": encoder.embedding,
        "codebook": pairs.codebook.hashes["rows"],
        "targets": sha256_tensors({"rows": pairs.target_rows}),
        "unsafe prompts": sha256_tensors({"ids": pairs.unsafe_ids}),
        "safe prompts": sha256_tensors({"ids": pairs.safe_ids}),
        "safe embeddings": pairs.originals.hashes["rows"],
        "device": f"{len(devices)} {encoder.device.type}",
        "number of processes": processes.count,
        "torch": str(torch.__version__),
    }


def facts_of(
    encoder: TextEncoder,
    codebook: Codebook,
    concept: losses.Concept,
    concept_prompts: Sequence[str],
    target: str,
    settings: Settings,
) -> dict[str, Any]:
    """The part of a checkpoint's metadata that says how it was made. Call it before training changes the encoder."""
    return asdict(settings) | {
        "concept_prompt": list(concept_prompts),
        "concept_guidance_scale": concept.alpha,
        "target": target,
        "concept_norm": concept.n.norm().item(),
        "encoder": encoder.index,
        "embedding": encoder.embedding,
        "base_encoder_sha256": encoder.base_sha256,
        "sequence_length": encoder.length,
        "codebook": codebook.hashes,
    }


def fit(
    output: Output,
    encoder: TextEncoder,
    pairs: Pairs,
    concept: losses.Concept,
    concept_prompts: Sequence[str],
    settings: Settings,
    processes: Processes,
    facts: Mapping[str, Any],
) -> None:
    """Train `encoder`, from the start or from an interrupted run's state, and write checkpoints, losses and states.

    `facts` go into the metadata of each checkpoint. Raises UserError if the folder holds checkpoints of a run with other inputs.
    """
    inputs = training_inputs(encoder, pairs, concept, concept_prompts, settings, processes)
    refuse_other_runs(output.folder, inputs)
    state = None if processes.sharded else RunState(output.folder / "state.pt", inputs, processes, output.save_every_steps)
    final = output.checkpoint(settings.num_epochs)
    done = state.start(output.resume, final) if state else 0
    if done is not None:
        for epoch in range(1, settings.num_epochs + 1):
            check_replaceable(output.checkpoint(epoch))
        summary = Summary(encoder, pairs, settings.batch_size, concept_prompts)
        facts = {**facts, "made_from": inputs, "base_sketch": base_sketch(encoder.model)}
        save = _Saver(output, encoder, concept, summary, settings, processes, facts)
        main = processes.is_main
        with (
            tracking(output.report_to if main else (), output.folder, inputs, done) as track,
            open_metrics(output.folder / "metrics.jsonl", done) if main else nullcontext(lambda step: None) as add_metrics,
        ):

            def on_step(step: dict) -> None:
                if state:
                    state.begin()
                add_metrics(step)
                track(step)

            train(encoder, pairs, concept, encoder.tokenize(list(concept_prompts)), settings, processes, on_step, save, state)
        if state:
            state.remove()
    if processes.is_main:
        warn_unprotected(read_metadata(final).get("embeddings"))


class _Saver:
    """Writes checkpoints, with the change of the embeddings in their metadata. Create it before training."""

    def __init__(
        self,
        output: Output,
        encoder: TextEncoder,
        concept: losses.Concept,
        summary: Summary,
        settings: Settings,
        processes: Processes,
        facts: Mapping[str, Any],
    ):
        self.output, self.model, self.concept, self.summary = output, encoder.model, concept, summary
        self.last_epoch, self.processes, self.facts = settings.num_epochs, processes, facts
        self.untrained = sha256_tensors(plain_names(encoder.model.state_dict()), trained_dtype(settings))

    def __call__(self, epoch: int, trained: TextEncoder) -> Path | None:
        """Write the checkpoint of `epoch` and return its path, or None for an epoch without one. Every process must call it."""
        last = epoch == self.last_epoch
        if not last and epoch % self.output.save_every:
            return None
        after, weights = self.summary.after(trained, self.concept), self.processes.state_dict(trained.model)
        path = self.output.checkpoint(epoch)
        if self.processes.is_main:
            refuse_untrained(weights, self.untrained, epoch)
            metadata = {"epoch": epoch, **self.facts, "protects": unprotected(after) is None, "embeddings": after}
            save_checkpoint(self.output.folder / f"checkpoint-{epoch}", self.model, weights, metadata, self.output.save_format)
            if last:
                log_summary(after, path)
        self.processes.wait()
        return path
