"""The state of a training run on disk, from which an interrupted run resumes; on a CPU, to the same weights bit for bit."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from des.models.checkpoints import is_as_recorded, read_metadata
from des.models.loading import read_pt
from des.utils.errors import UserError
from des.utils.files import replacing, write_text
from des.utils.logs import logger
from des.utils.processes import Processes
from des.utils.resume import differing

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_CONTENT = {"made_from", "point", "random", "weights", "optimizer"}  # of state.pt
_RESTART = "leave out --resume to start from scratch"


@dataclass
class Progress:
    """How far training has come."""

    done: int = 0  # finished steps, of all epochs
    sums: dict[str, float] = field(default_factory=dict)  # each loss, summed over the epoch's pairs so far
    checkpoint: str | None = None  # path of the last one

    def add(self, values: Mapping[str, float], pairs: int) -> None:
        """Count a step of `pairs` pairs with the mean losses `values`."""
        self.done += 1
        self.sums = {name: self.sums.get(name, 0.0) + value * pairs for name, value in values.items()}


class RunState:
    """The file state.pt of a run: its progress, the weights, the optimizer's state, and every process's random state.

    `inputs` is everything the weights depend on; the state of a run with other inputs is refused. `every` is the number of steps
    between states within an epoch; with None, states are saved with checkpoints only. The main process writes the file.
    """

    def __init__(self, path: Path, inputs: Mapping[str, Any], processes: Processes, every: int | None = None):
        self.path = path
        self.inputs = dict(inputs)
        self.processes = processes
        self.every = every
        self._found: dict[str, Any] | None = None
        self._abandoned = False  # whether the file is of an earlier run, which is not resumed

    def start(self, resume: bool, final: Path) -> int | None:
        """The number of finished steps, or None if `resume` is set and `final`, the checkpoint of the last epoch, exists.

        Reads the state for `restore`. Without `resume`, an old state is kept until the first step (`begin`). Raises UserError if
        `resume` finds the files of another run, or a damaged state.
        """
        found = self.path.exists()
        if not resume:
            if found:
                logger.warning("training starts from scratch, and its first step removes %s; --resume would use it", self.path)
            self._abandoned = found
            return 0
        if final.exists() and self._is_finished(final, found):
            logger.info("nothing to do: training is finished; its encoder is %s", final)
            return None
        if not found:
            logger.info("there is no %s to resume from; starting from scratch", self.path)
            return 0
        self._found = self._read()
        done = self._found["point"]["done"]
        logger.info("resuming after step %d, from %s", done, self.path)
        return done

    def _is_finished(self, final: Path, state_exists: bool) -> bool:
        """Whether `final` is this run's last checkpoint. Raises UserError if it is another run's and no state exists."""
        before = read_metadata(final).get("made_from")
        differs = changes(before, self.inputs) if before else "version of this program"
        if differs and not state_exists:
            advice = "leave out --resume to replace it, or name another --output_dir"
            raise UserError(f"{final} is of a run with another {differs}; {advice}")
        if differs or is_as_recorded(final):
            return not differs
        logger.warning("%s is damaged; training %s", final, "resumes from its state" if state_exists else "starts from scratch")
        return False

    def restore(self, model: nn.Module, optimizer: Optimizer) -> Progress:
        """Load the state that `start` read, if any, into `model` (not wrapped), the optimizer and the random generators."""
        if self._found is None:
            return Progress()
        found, self._found = self._found, None
        model.load_state_dict(found["weights"])
        optimizer.load_state_dict(found["optimizer"])
        _set_random_state(model, found["random"][self.processes.rank])
        return Progress(**found["point"])

    def begin(self) -> None:
        """Remove an earlier run's state. Call it after the first step, so that a run that fails earlier loses nothing."""
        if self._abandoned:
            self.remove()
            self._abandoned = False

    def due(self, progress: Progress) -> bool:
        """Whether to save a state after this step."""
        return self.every is not None and progress.done % self.every == 0

    def save(self, progress: Progress, model: nn.Module, optimizer: Optimizer) -> None:
        """Write the state atomically. Every process must call it."""
        random = self.processes.gather(_random_state(model))
        if self.processes.is_main:
            content = {"made_from": self.inputs, "point": asdict(progress), "random": random}
            content |= {"weights": model.state_dict(), "optimizer": optimizer.state_dict()}
            with replacing(self.path) as temporary:
                torch.save(content, temporary)
        self.processes.wait()

    def remove(self) -> None:
        """Remove the file."""
        if self.processes.is_main:
            self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        content = None
        with contextlib.suppress(Exception):  # damaged bytes raise errors of many classes; read_pt below reports them
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(self.path)
            if any(name.startswith("torchao") for name in unsafe):
                import torchao.optim  # noqa: F401  registers its class of 8-bit moments with torch.load
        content = read_pt(self.path)
        if not isinstance(content, dict) or content.keys() != _CONTENT:
            raise UserError(f"{self.path} is damaged, or not a state that this version can read; {_RESTART}")
        differs = changes(content["made_from"], self.inputs)
        if differs:
            raise UserError(f"the state in {self.path} is of a run with another {differs}; {_RESTART}")
        return content


def refuse_other_runs(run_dir: Path, inputs: Mapping[str, Any]) -> None:
    """Raise UserError if `run_dir` holds checkpoints of a run with other inputs, so that runs never mix in one folder."""
    found = set()
    for path in run_dir.glob("checkpoint-*"):
        name = path.name.removesuffix("-metadata.json")
        found.add(name.removesuffix(path.suffix) if path.is_file() else name)
    for name in sorted(found):
        before = read_metadata(run_dir / name).get("made_from")
        differs = changes(before, inputs) if isinstance(before, dict) else "origin, which is not recorded"
        if differs:
            advice = "name another --output_dir, or move them away"
            raise UserError(f"{run_dir} holds {name} of a run with another {differs}; {advice}")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The names of the inputs that differ, with both values if they are short; an empty text if none differs.

    Inputs that records of earlier versions lack (`des.utils.resume.ADDED`) count as equal.
    """
    differ = set(differing(before, now))

    def show(name: str) -> str:
        values = [str(each.get(name, "none")) for each in (before, now)]
        return f"{name} ({values[0]}, now {values[1]})" if max(map(len, values)) < 64 else name

    return " and another ".join(show(name) for name in before | now if name in differ)


@contextlib.contextmanager
def open_metrics(path: Path, done: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that appends the losses of a step to metrics.jsonl, of which the first `done` lines are kept.

    The other lines are of steps that are repeated. They are removed at the first step, so that a run that fails earlier loses
    nothing.
    """
    with contextlib.ExitStack() as stack:
        files: list[TextIO] = []

        def add(step: Mapping[str, Any]) -> None:
            if not files:
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if done and path.exists() else []
                write_text(path, "".join(lines[:done]))
                files.append(stack.enter_context(path.open("a", encoding="utf-8")))
            files[0].write(json.dumps(step) + "\n")
            files[0].flush()

        yield add


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return sorted(devices, key=lambda device: device.index)


def _random_state(model: nn.Module) -> list[Tensor]:
    """The random state of the CPU and of each CUDA device that holds a part of the model."""
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, _cuda_devices(model))]


def _set_random_state(model: nn.Module, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(_cuda_devices(model), states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)
