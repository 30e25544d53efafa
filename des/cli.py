"""What every script shares on its command line: user errors, argument types, devices, logging, progress."""

import argparse
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm import tqdm

logger = logging.getLogger("des")
_LOG_LINE = re.compile(r"\d\d:\d\d:\d\d ")


class UserError(Exception):
    """Something the user can mend, said in one sentence; scripts print it and exit with 1, without a traceback."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows range and default after each option, and keeps the script's docstring as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str:
        told, default = action.help or "", action.default
        facts = [action.type.told] if hasattr(action.type, "told") else []
        if facts and "(default" in told:
            return told.replace("(default", f"({facts[0]}; default", 1)
        flagged = action.nargs == 0 or default is None or default is argparse.SUPPRESS or default == []
        if action.option_strings and not flagged and "(default" not in told:
            value = " ".join(map(str, default)) if isinstance(default, list) else str(default)
            facts.append("default: " + value.replace("%", "%%"))
        return f"{told} ({'; '.join(facts)})" if facts else told


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`, turning what the user can mend into one line on stderr and a non-zero exit."""
    try:
        main()
    except UserError as error:
        logger.debug("error: %s", error)  # for --log_file; exit prints it
        sys.exit(f"error: {error}")
    except UnicodeError:
        sys.exit("error: a name or text on the command line is not in UTF-8, as models and result files need it")
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        sys.exit("error: memory ran out; use a smaller --batch_size, smaller images, or another --device")
    except OSError as error:
        sys.exit(f"error: {error.strerror or error}: {error.filename or 'a file'} could not be read or written")
    except KeyboardInterrupt:
        sys.exit("interrupted; finished files are kept")


_LARGEST = 2**63 - 1  # what Python counts with; and seeds, to which rows and copies are added, end at 2^64


def number(kind: type, low: float, high: float = math.inf, low_open: bool = False) -> Callable[[str], float]:
    """Return an argparse type: a finite `kind` (int or float) within low..high (`low_open`: low itself is refused)."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or abs(value) == math.inf or (low_open and value == low):  # NaN is in no range
            raise argparse.ArgumentTypeError(f"{text} is outside its range: {parse.told}")
        return value

    parse.__name__ = kind.__name__
    least = f"above {low}" if low_open else f"{low} or more"
    parse.told = least if high in (math.inf, _LARGEST) else f"{least}, up to {high}" if low_open else f"{low} to {high}"
    return parse


positive_int = number(int, 1, _LARGEST)
natural = number(int, 0, _LARGEST)


def output_file(text: str) -> Path:
    """An argparse type for a file that will be written: no folder, and below no file."""
    path = Path(text)
    if not text.strip() or text.endswith(("/", os.sep)) or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, and a file is written there; name a file")
    return _below_folders(path)


def output_folder(text: str) -> Path:
    """An argparse type for a folder that will be written into: no file, and below no file."""
    path = Path(text)
    if not text.strip() or (path.exists() and not path.is_dir()):
        raise argparse.ArgumentTypeError(f"{text!r} is a file, and a folder is written there; name a folder")
    return _below_folders(path)


def _below_folders(path: Path) -> Path:
    above = next((parent for parent in path.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise argparse.ArgumentTypeError(f"{str(path)!r} cannot be written, because {above} is a file; name another place")
    return path


def check_outputs(outputs: Iterable[Path | None], inputs: Iterable[Path | None]) -> None:
    """Raise UserError where a file to be written is a folder, or one of the inputs, or written twice; None is no file."""
    read = {path.resolve() for path in inputs if path is not None}
    written: set[Path] = set()
    for path in filter(None, outputs):
        if path.is_dir():
            raise UserError(f"{path} is a folder, and a file is written there; name another output")
        if path.resolve() in read:
            raise UserError(f"{path} would be written, and is an input or the log; name another output")
        if path.resolve() in written:
            raise UserError(f"{path} would be written twice; name different outputs")
        written.add(path.resolve())


def device(text: str) -> torch.device:
    """An argparse type for `cpu`, `cuda`, `cuda:1`, `mps`, or a bare CUDA index such as `0`."""
    try:
        chosen = torch.device(f"cuda:{text}" if text.isdigit() else text)
        if chosen.type == "meta":  # it holds shapes and no values
            raise RuntimeError
    except (RuntimeError, ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no device; use cpu, cuda:0, cuda:1, …") from None
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(f"{text!r} is not there, or this PyTorch cannot use it; cpu always works") from None
    return chosen


def add_device(parser: argparse._ActionsContainer, flag: str = "--device") -> None:
    """Add the device option; the default is the first CUDA device, or the CPU where there is none."""
    default = "cuda:0" if torch.cuda.is_available() else "cpu"
    parser.add_argument(flag, dest="device", type=device, default=default, metavar="D", help="cpu, cuda:0, …")


def add_batches(parser: argparse._ActionsContainer, batch_size: int) -> None:
    """Add the options of a scorer that reads images in batches."""
    parser.add_argument("--batch_size", type=positive_int, default=batch_size, metavar="N", help="images a forward pass")
    workers = os.cpu_count() or 4
    parser.add_argument("--num_workers", type=positive_int, default=workers, metavar="N", help="threads that read images ahead")


def add_expected(parser: argparse._ActionsContainer) -> None:
    """Add the option that says how many images a folder must hold."""
    parser.add_argument(
        "--expected",
        type=positive_int,
        metavar="N",
        help="number of images that the folder must hold (default: all that its run claims and its prompt list has)",
    )


def add_other_prompts(parser: argparse._ActionsContainer) -> None:
    """Add the option for prompts that are not those which drew the images."""
    parser.add_argument(
        "--other_prompts",
        action="store_true",
        help="score by prompts that did not draw the images, such as what found prompts stand for; the result records it",
    )


def add_model(parser: argparse._ActionsContainer) -> None:
    """Add the model option; the default is the paper's main model."""
    default = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    parser.add_argument("--model_path", default=default, metavar="M", help="pipeline, a folder or hub id")


def add_embedding(parser: argparse._ActionsContainer) -> None:
    """Add the options that say how an embedding is read; a codebook and its training must agree on them."""
    parser.add_argument(
        "--embedding",
        choices=("last_hidden_state", "pipeline"),
        default="last_hidden_state",
        help="last_hidden_state is the paper's; pipeline is the tensor that the pipeline feeds to its denoiser",
    )
    parser.add_argument(
        "--max_sequence_length",
        type=positive_int,
        metavar="N",
        help="tokens of a T5 prompt (default: its tokenizer's, or the pipeline's with --embedding pipeline: SD3 256, FLUX 512)",
    )


def add_deterministic(parser: argparse._ActionsContainer) -> None:
    """Add the option for results that are the same bit for bit at every run on a GPU."""
    told = "algorithms that give the same bits at every run, on CUDA too, where they are slower"
    parser.add_argument("--deterministic", action="store_true", help=told)


def add_log_file(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the group with the option for a copy of the log."""
    group = parser.add_argument_group("log")
    group.add_argument(
        "--log_file", type=output_file, metavar="F", help="add the log lines to this file too, with more details"
    )
    return group


def make_deterministic() -> None:
    """Use deterministic algorithms only; to be called before the first product of matrices on a GPU, which starts cuBLAS."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def progress(items: Iterable | None, **options) -> tqdm:
    """A tqdm bar on a terminal; nothing in a pipe, where log lines tell how far the run is."""
    return tqdm(items, disable=None, dynamic_ncols=True, **options)


class _BesideBars(logging.StreamHandler):
    """Writes log lines to stderr above progress bars instead of into them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _is_log(path: Path) -> bool:
    """Whether a file is empty or starts as a log does."""
    with path.open(encoding="utf-8", errors="replace") as file:
        start = file.read(9)
    return not start or bool(_LOG_LINE.match(start))


def setup_logging(*log_files: Path | None, quiet: bool = False) -> None:
    """Send the project's log lines to stderr and to files (None is none), which get the details (DEBUG) that stderr omits.

    `quiet` is for the processes beside the main one: they write no file, and say nothing below an error. Raises UserError for a
    file with other content than such lines.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    handlers: list[logging.Handler] = [_BesideBars()]
    for log_file in () if quiet else filter(None, log_files):
        log_file.parent.mkdir(parents=True, exist_ok=True)
        if log_file.is_file() and not _is_log(log_file):
            raise UserError(f"{log_file} holds something else than a log; give another file")
        handlers.append(logging.FileHandler(log_file, encoding="utf-8", errors="backslashreplace"))
    handlers[0].setLevel(logging.ERROR if quiet else logging.INFO)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    warnings.filterwarnings("ignore", module="huggingface_hub")  # about its own internals
    for library in (transformers_logging, diffusers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
