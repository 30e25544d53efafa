"""The state of a training run on disk, from which an interrupted run goes on to the same weights bit for bit."""

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

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_CONTENT = {"made_from", "point", "random", "weights", "optimizer"}
_ANEW = "leave out --resume to start anew"


@dataclass
class Progress:
    """How far training is."""

    done: int = 0  # steps of all epochs
    sums: dict[str, float] = field(default_factory=dict)  # each loss over the epoch's pairs so far
    checkpoint: str | None = None  # the last that was written

    def add(self, values: Mapping[str, float], pairs: int) -> None:
        """Count one more step, whose mean losses over its `pairs` are `values`."""
        self.done += 1
        self.sums = {name: self.sums.get(name, 0.0) + value * pairs for name, value in values.items()}


class RunState:
    """The file with a run's state: where training is, the weights, the optimizer's state, and every process's random state.

    `made_from` names all that decides the weights; a state of something else is refused. `every` is the number of steps between
    states within an epoch, None for none. The processes hold equal weights, so the main one writes for all.
    """

    def __init__(self, path: Path, made_from: Mapping[str, Any], processes: Processes, every: int | None = None):
        self.path = path
        self.made_from = dict(made_from)
        self.processes = processes
        self.every = every
        self._found: dict[str, Any] | None = None
        self._given_up = False  # a state is there that this run does not go on from

    def start(self, resume: bool, final: Path) -> int | None:
        """The step after which training goes on, 0 for the beginning; None where `resume` finds the last checkpoint, `final`.

        Reads the state for `restore`; without `resume` it goes after the first step. Raises UserError where `resume` finds the
        files of another run, or a damaged state.
        """
        there = self.path.exists()
        if not resume:
            if there:
                told = "starting anew; %s, of an interrupted run, goes after the first step (--resume goes on from it)"
                logger.warning(told, self.path)
            self._given_up = there
            return 0
        if final.exists():
            before = read_metadata(final).get("made_from")
            differs = changes(before, self.made_from) if before else "version of this program"
            if not differs and is_as_recorded(final):
                logger.info("nothing to do: training is finished, and the protected encoder in %s", final)
                return None
            if not differs:
                logger.warning("%s is damaged; training %s", final, "goes on from the state" if there else "starts anew")
            elif not there:
                told = "leave out --resume to replace it, or name another --output_dir"
                raise UserError(f"{final} is of a run with another {differs}; {told}")
        if not there:
            logger.info("there is no %s to go on from; starting from the beginning", self.path)
            return 0
        self._found = self._read()
        done = self._found["point"]["done"]
        logger.info("going on after step %d, from %s", done, self.path)
        return done

    def restore(self, model: nn.Module, optimizer: Optimizer) -> Progress:
        """Put the state that was found into `model` (not wrapped), its optimizer and the random generators, if there is one."""
        if self._found is None:
            return Progress()
        found, self._found = self._found, None
        model.load_state_dict(found["weights"])
        optimizer.load_state_dict(found["optimizer"])
        _set_random_state(model, found["random"][self.processes.rank])
        return Progress(**found["point"])

    def begin(self) -> None:
        """Remove the state of a run that is given up; to be called once a step is done, which replaces what that run did."""
        if self._given_up:
            self.remove()
            self._given_up = False

    def due(self, at: Progress) -> bool:
        """Whether a state is to be saved after this step."""
        return self.every is not None and at.done % self.every == 0

    def save(self, at: Progress, model: nn.Module, optimizer: Optimizer) -> None:
        """Write the state, whole or not at all; every process must call it."""
        random = self.processes.gather(_random_state(model))
        if self.processes.is_main:
            content = {"made_from": self.made_from, "point": asdict(at), "random": random}
            content |= {"weights": model.state_dict(), "optimizer": optimizer.state_dict()}
            with replacing(self.path) as temporary:
                torch.save(content, temporary)
        self.processes.wait()

    def remove(self) -> None:
        """Remove the state, of a run that is finished or given up."""
        if self.processes.is_main:
            self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        content = None
        with contextlib.suppress(Exception):  # of any class at damaged bytes, which read_pt then tells
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(self.path)
            if any(name.startswith("torchao") for name in unsafe):
                import torchao.optim  # noqa: F401  makes torch.load know its class of 8-bit moments
        content = read_pt(self.path)
        if not isinstance(content, dict) or content.keys() != _CONTENT:
            raise UserError(f"{self.path} is damaged, or no state that this version can read; {_ANEW}")
        differs = changes(content["made_from"], self.made_from)
        if differs:
            raise UserError(f"the state in {self.path} is of a run with another {differs}; {_ANEW}")
        return content


def refuse_other_runs(run_dir: Path, made_from: Mapping[str, Any]) -> None:
    """Raise UserError where `run_dir` holds a checkpoint of another run, which training would replace in part or leave beside its own."""
    found = {path.name.removesuffix("-metadata.json").removesuffix(path.suffix if path.is_file() else "") for path in
             run_dir.glob("checkpoint-*")}  # fmt: skip
    for name in sorted(found):
        told = read_metadata(run_dir / name)
        before = told.get("made_from")
        differs = changes(before, made_from) if isinstance(before, dict) else "origin, which is not recorded"
        if differs:
            advice = "name another --output_dir, or move them away"
            raise UserError(f"{run_dir} holds {name} of a run with another {differs}; {advice}")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which items differ, in words, with both values where they are short; empty where none does."""
    differ = [name for name in before | now if before.get(name) != now.get(name)]

    def told(name: str) -> str:
        values = [str(each.get(name, "none")) for each in (before, now)]
        return f"{name} ({values[0]}, now {values[1]})" if max(map(len, values)) < 64 else name

    return " and another ".join(map(told, differ))


@contextlib.contextmanager
def open_metrics(path: Path, done: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Give a function that adds a step's losses to metrics.jsonl, after step `done`.

    What is there stays until the first step. Then lines of later steps go, because those steps are made again; all lines where
    `done` is 0.
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
