"""Experiment trackers of accelerate, which get the losses of each step as metrics.jsonl does."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from des.utils.errors import UserError

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name} needs its package; pip install {name}")


@contextmanager
def tracking(
    names: Sequence[str], run_dir: Path, config: Mapping[str, Any], done: int = 0
) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Start trackers, and yield a function that logs the losses of a step, with its number as `step`; finish them at the end.

    TensorBoard writes into run_dir/tensorboard, where steps after `done` are replaced; wandb, with the project name "des", into
    run_dir/wandb. Raises UserError if a tracker cannot start.
    """
    if names:
        PartialState(cpu=True)  # trackers need one; where several processes have set it up already, this changes nothing
    plain = {name: value if isinstance(value, str | int | float) else str(value) for name, value in config.items()}
    with ExitStack() as stack:
        trackers: list[GeneralTracker] = []
        for name in names:
            if name != "tensorboard":
                trackers.append(_start(name, run_dir, plain, done))
                stack.callback(trackers[-1].finish)
        waiting = ["tensorboard"] if "tensorboard" in names else []

        # TensorBoard hides the later steps of an earlier run as soon as it starts. So it starts with the first step: a run that fails
        # earlier hides nothing.
        def log(step: Mapping[str, float]) -> None:
            while waiting:
                trackers.append(_start(waiting.pop(), run_dir, plain, done))
                stack.callback(trackers[-1].finish)
            values = {name: value for name, value in step.items() if name != "step"}
            for tracker in trackers:
                tracker.log(values, step=step["step"])

        yield log


def _start(name: str, run_dir: Path, config: dict[str, Any], done: int) -> GeneralTracker:
    try:
        if name == "tensorboard":
            tracker = TensorBoardTracker("tensorboard", run_dir, purge_step=done + 1)
        else:
            tracker = WandBTracker("des", name=run_dir.name, dir=run_dir, config=config)
        tracker.start()
        if name == "tensorboard":
            tracker.tracker.add_text("settings", "\n\n".join(f"{key}: {value}" for key, value in config.items()))
        return tracker
    except Exception as error:  # wandb raises errors of many classes if it has no account or network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "; `wandb login` first, or set WANDB_MODE=offline" if name == "wandb" else ""
        raise UserError(f"--report_to {name} could not start: {reason}{hint}") from None
