"""The processes that `accelerate launch` started, or one process alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from des.utils.errors import UserError

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

_SUPPORTED = (DistributedType.NO, DistributedType.FSDP)  # and all that begin with MULTI_


def _launched_count() -> int:
    """The number of processes that a launcher started; 1 without a launcher.

    Some clusters (Kubeflow, sbatch scripts) set WORLD_SIZE for jobs that no launcher started. Such a job would do its share of the
    work only. Launchers set RANK and LOCAL_RANK as well, so both are required. Raises UserError that names the variable to unset.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"WORLD_SIZE is {text!r}, which is not a number of processes; unset WORLD_SIZE")
    count = int(text)
    lacking = [name for name in ("RANK", "LOCAL_RANK") if not os.environ.get(name, "").isdecimal()]
    if count > 1 and lacking:
        raise UserError(
            f"WORLD_SIZE is {count}, but {' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not set, so no launcher "
            "started this process; unset WORLD_SIZE, or start the script with accelerate launch"
        )
    for kind in (
        DistributedType.DEEPSPEED,
        DistributedType.MEGATRON_LM,
    ):  # accelerate, which knows this, is not used for one process
        if os.environ.get(f"ACCELERATE_USE_{kind.value}", "").lower() in ("1", "true", "yes", "on", "y", "t"):
            _check_type(kind)
    return count


def _check_type(kind: DistributedType) -> None:
    """Raise UserError for a kind of distributed training that this code does not support."""
    if kind not in _SUPPORTED and not kind.value.startswith("MULTI_"):
        raise UserError(
            f"accelerate is configured for {kind.value}, which is not supported; choose no distribution, multi-GPU, "
            "multi-CPU or FSDP in accelerate config"
        )


class Processes:
    """The number of processes that share the work, the rank of this one, and its device.

    One process uses the given `device`. Under `accelerate launch` each process has a device of its node, and a model is replicated
    or sharded (FSDP) as accelerate is configured. `all_trained` says that every parameter gets a gradient.
    """

    def __init__(self, device: torch.device, all_trained: bool = True):
        launched = _launched_count()
        self._accelerator: Accelerator | None = None
        if launched > 1:
            patience = InitProcessGroupKwargs(
                timeout=timedelta(hours=12)
            )  # the others wait while the main process searches the targets
            replicas = DistributedDataParallelKwargs(find_unused_parameters=not all_trained, gradient_as_bucket_view=True)
            self._accelerator = Accelerator(
                cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[replicas, patience]
            )
            device = self._accelerator.device
            _check_type(self._accelerator.distributed_type)
        self.count = self._accelerator.num_processes if self._accelerator else 1
        if self.count != launched:
            raise UserError(
                f"WORLD_SIZE is {launched}, but accelerate runs {self.count} process{'es' if self.count > 1 else ''}; "
                "unset WORLD_SIZE, or start the script with accelerate launch"
            )
        self.device = device
        self.rank = self._accelerator.process_index if self._accelerator else 0

    def __str__(self) -> str:
        return f"{self.count} process{'es' if self.count > 1 else ''}"

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files that all of them share."""
        return self.rank == 0

    @property
    def hashes_files(self) -> bool:
        """Whether this process checks the hashes of large input files: one process on each machine does."""
        return self._accelerator is None or self._accelerator.is_local_main_process

    @property
    def sharded(self) -> bool:
        """Whether weights, gradients and optimiser states are split over the processes."""
        return self._accelerator is not None and self._accelerator.distributed_type == DistributedType.FSDP

    def share(self, items: Any) -> Any:
        """The part of a list or tensor for this process: every `count`-th item, from `rank` on."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Wait until all processes have reached this call."""
        if self._accelerator:
            self._accelerator.wait_for_everyone()

    @contextmanager
    def same_random_stream(self, seed: int) -> Iterator[None]:
        """Use one random stream in all processes inside this block, so that replicas round identically."""
        if self.count == 1:
            yield
            return
        devices = [] if self.device.type == "cpu" else [self.device]
        with torch.random.fork_rng(devices, device_type="cuda" if not devices else self.device.type):
            torch.manual_seed(seed)
            yield

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        return self._accelerator.reduce(values, "mean") if self._accelerator else values

    def gather(self, item: Any) -> list[Any]:
        """The `item` of each process, ordered by rank. Every process must call it."""
        return gather_object([item]) if self._accelerator else [item]

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """The model and optimiser to train with: unchanged in one process, otherwise replicated or sharded."""
        return self._accelerator.prepare(model, optimizer) if self._accelerator else (model, optimizer)

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The full state of a prepared model. Every process must call it, and only the main one may use the result."""
        return self._accelerator.get_state_dict(model) if self._accelerator else model.state_dict()
