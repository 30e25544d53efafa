"""Experiment trackers (accelerate's) that get a training run's losses, as its metrics.jsonl does."""

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
    """Start trackers, and give a function that takes each step's losses with its `step`; they are finished at the end.

    TensorBoard's files go to run_dir/tensorboard, where the first step replaces those after `done`; wandb's, of the
    project "des", to run_dir/wandb. Raises UserError where a tracker cannot start.
    """
    if names:
        PartialState(cpu=True)  # accelerate's trackers need one; several processes have it already, and it is left unchanged
    plain = {name: value if isinstance(value, str | int | float) else str(value) for name, value in config.items()}
    with ExitStack() as stack:
        trackers: list[GeneralTracker] = []
        for name in names:
            if name != "tensorboard":
                trackers.append(_start(name, run_dir, plain, done))
                stack.callback(trackers[-1].finish)
        waiting = ["tensorboard"] if "tensorboard" in names else []

        # TensorBoard hides an earlier run's later steps as soon as it starts. It starts with the first step, so that a run that fails
        # before it hides nothing.
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
    except Exception as error:  # wandb raises errors of many classes where it has no account or network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "; `wandb login` first, or set WANDB_MODE=offline" if name == "wandb" else ""
        raise UserError(f"--report_to {name} could not start: {reason}{hint}") from None
