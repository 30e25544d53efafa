"""The memory and disk space of a training run, computed from the encoder's configuration before any weight is read."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

from des.models.loading import release
from des.training import losses
from des.utils.choices import OPTIMIZERS
from des.utils.errors import UserError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

GB = 1e9
CARDS = (24, 40, 80)  # GB
MARGIN = 1.5  # GB
PARTS = ("weights", "gradients", "optimizer", "activations", "total")
_FAKE_CUDA = (2, 10)  # releases of torch before it abort when a fake CUDA tensor is computed without a GPU
_BLOCK, _SMALLEST = 256, 4096  # torchao's 8-bit states: values per scale, and the smallest tensor that is quantized
Read = Callable[[nn.Module, Tensor], Tensor]  # ids [n, tokens] to embeddings [n, rows, hidden], with the model that is given


@dataclass(frozen=True)
class Plan:
    """The needs of a training run: bytes on each device, and bytes on disk for the codebook."""

    parameters: int  # number of trainable parameters; tied ones count once
    weights: int
    gradients: int
    optimizer: int
    activations: int
    codebook_on_disk: int
    steps: int
    processes: int
    sharded: bool

    @property
    def total(self) -> int:
        """An upper bound of the bytes on each device: the backward pass frees activations while it allocates gradients.

        Simulated steps of CLIP-L and T5-XXL, temporaries included, peak between this sum and the sum without the smaller of the two.
        """
        return self.weights + self.gradients + self.optimizer + self.activations


def make_plan(
    model: nn.Module,
    read: Read,
    tokens: int,
    batch_size: int,
    pairs: int,
    num_epochs: int,
    codebook_rows: int,
    codebook_itemsize: int,
    optimizer: str,
    autocast: torch.dtype | None,
    gradient_checkpointing: bool,
    processes: int = 1,
    sharded: bool = False,
) -> Plan:
    """Compute the needs of training `model`, which is on the meta device in the dtype it is trained in.

    `batch_size` is the number of pairs per step over all `processes`, `pairs` the number per epoch. `gradient_checkpointing` says
    whether the model has it enabled. `sharded` splits weights, gradients and optimizer state evenly; the one block that FSDP
    gathers at a time is not counted.
    Raises ValueError for an unknown optimizer.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"{optimizer} is not a known optimizer; choose one of {', '.join(OPTIMIZERS)}")
    here = math.ceil(min(batch_size, pairs) / processes)
    activations, embedding_values = _activations(model, read, tokens, here, autocast, gradient_checkpointing)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    share = processes if sharded else 1
    return Plan(
        parameters=sum(parameter.numel() for parameter in trainable),
        weights=math.ceil(sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers())) / share),
        gradients=math.ceil(sum(parameter.nbytes for parameter in trainable) / share),
        optimizer=math.ceil(sum(_state(parameter, optimizer) for parameter in trainable) / share),
        activations=activations,
        codebook_on_disk=codebook_rows * embedding_values * codebook_itemsize,
        steps=num_epochs * math.ceil(pairs / batch_size),
        processes=processes,
        sharded=sharded,
    )


def describe(plan: Plan) -> str:
    """The plan as text: GB (1e9 bytes) on each device, the GPUs with enough memory, and what reduces the need."""
    where = "on one device"
    if plan.processes > 1:
        where = f"on each of {plan.processes} devices, {'sharded' if plan.sharded else 'replicated'}"
    held = [card for card in CARDS if plan.total / GB + MARGIN <= card]
    fits = ", ".join(f"{card} GB {'yes' if card in held else 'no'}" for card in CARDS)
    lines = [
        f"{plan.parameters:,} parameters to train in {plan.steps:,} steps; the codebook takes {_gb(plan.codebook_on_disk)} GB of disk",
        f"memory {where}, at most, in GB:",
        *(f"  {part:<12}{_gb(getattr(plan, part)):>9}" for part in PARTS),
        f"GPUs with enough memory, with {MARGIN} GB for CUDA's context and fragmentation: {fits}",
    ]
    if len(held) < len(CARDS):
        lines.append(
            "to reduce this: gradient checkpointing or a smaller batch (activations), "
            "adamw8bit (optimizer), sharding over more devices (weights, gradients, optimizer)"
        )
    return "\n".join(lines)


def _gb(count: int) -> str:
    return f"{count / GB:,.2f}"


def _state(parameter: Tensor, optimizer: str) -> int:
    """Bytes of AdamW's two moments and step count of one parameter; torchao's 8-bit moments have scales and a table each."""
    count = parameter.numel()
    if optimizer == "adamw8bit" and count >= _SMALLEST and count % _BLOCK == 0:
        return 2 * (count + 4 * (count // _BLOCK) + 4 * 256) + 4
    return 2 * parameter.nbytes + 4


def _activations(
    model: PreTrainedModel, read: Read, tokens: int, batch: int, autocast: torch.dtype | None, gradient_checkpointing: bool
) -> tuple[int, int]:
    """Bytes that a step of `batch` pairs keeps for its backward pass on a CUDA device, and the values in one embedding.

    The step runs on fake CUDA tensors, which have shapes, dtypes and CUDA's choice of kernels but no memory, so it needs no GPU.
    Raises UserError where the installed torch cannot do that.
    """
    if release("torch") < _FAKE_CUDA and not torch.cuda.is_available():
        needed = ".".join(map(str, _FAKE_CUDA))
        raise UserError(
            f"torch {torch.__version__} cannot compute a GPU's memory on a machine without a GPU; run this on a machine with one, or "
            f"install torch {needed} or newer"
        )
    model = copy.deepcopy(model).train()
    if gradient_checkpointing:
        _run_last_block_without_checkpointing(model)
    with FakeTensorMode(allow_non_fake_inputs=True), _FusedAttention():
        # `to_empty` cannot move tied weights to a fake device, so each weight is replaced by a separate fake tensor.
        for module in model.modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                fake = torch.empty_like(tensor, device="cuda")
                setattr(module, name, nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake)
        return _step(model, read, tokens, batch, autocast)


def _run_last_block_without_checkpointing(model: PreTrainedModel) -> None:
    """Change a model with gradient checkpointing so that the tensors of its last block are counted as kept.

    A step keeps the inputs of the blocks, and the backward pass recomputes the last block while it holds all of them.
    """
    calls = count(1)
    for module in model.modules():  # either the blocks or the stack of them, depending on the release of transformers
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint:

            def run(block: Callable[..., Any], *inputs: Any, checkpoint: Callable[..., Any] = checkpoint) -> Any:
                return block(*inputs) if next(calls) == model.config.num_hidden_layers else checkpoint(block, *inputs)

            module._gradient_checkpointing_func = run


def _step(model: nn.Module, read: Read, tokens: int, batch: int, autocast: torch.dtype | None) -> tuple[int, int]:
    """Run one forward pass and the losses as `des.training.loop` does; returns the bytes kept and the values in one embedding.

    The step keeps, besides the weights, the tensors that autograd saves, the embeddings, and t(u) and E(s) in fp32. Each storage
    counts once.
    """
    weights = {tensor.untyped_storage()._cdata for tensor in chain(model.parameters(), model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # by address, which is not reused while the storage is referenced

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    def constant(like: Tensor) -> Tensor:
        return torch.empty(like.shape, device="cuda")

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with _cuda_autocast(autocast) if autocast else nullcontext():
            embeddings = keep(read(model, torch.zeros(2 * batch + 1, tokens, dtype=torch.long, device="cuda")))
        unsafe, safe, concept_now = embeddings.split([batch, batch, 1])
        concept = losses.Concept(constant(safe[0]), constant(safe[0]), alpha=1.0)
        target, original = keep(concept.target(constant(unsafe))), keep(constant(safe))
        losses.total(unsafe, safe, concept_now, target, original, concept)
    return sum(storage.nbytes() for storage in kept.values()), safe[0].numel()


class _FusedAttention(TorchFunctionMode):
    """Use the fused CUDA kernel of attention, which keeps no score matrix; without a GPU, PyTorch would choose the unfused one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        attend = _attention if func is F.scaled_dot_product_attention else func
        return attend(*args, **(kwargs or {}))


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None) -> Tensor:
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (query, key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    fused = torch.ops.aten._scaled_dot_product_efficient_attention
    return fused(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def _cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """`torch.autocast("cuda", dtype)`, which turns itself off where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.clear_autocast_cache()  # of weights that were cast
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
