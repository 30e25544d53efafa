"""Command lines: options that several scripts share, argument types, and exit on errors."""

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from des.utils.errors import UserError, not_found
from des.utils.logs import logger


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the range and default of each option, and keeps the line breaks of the script's docstring."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        facts = [action.type.range] if hasattr(action.type, "range") else []
        if facts and "(default" in text:
            return text.replace("(default", f"({facts[0]}; default", 1)
        flagged = action.nargs == 0 or default is None or default is argparse.SUPPRESS or default == []
        if action.option_strings and not flagged and "(default" not in text:
            value = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
            facts.append("default: " + value.replace("%", "%%"))
        return f"{text} ({'; '.join(facts)})" if facts else text


class Parser(argparse.ArgumentParser):
    """Reads a script's command line; `description` is the script's docstring. A wrong one ends in one line and exit status 2."""

    def __init__(self, description: str | None = None):
        super().__init__(description=description, formatter_class=HelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Exit with `message` and, for an unknown option, the option that is most like it."""
        given = [text.split("=")[0] for text in sys.argv[1:] if text.startswith("--") and len(text) > 2 and " " not in text]
        unknown = [name for name in given if not any(option.startswith(name) for option in self._option_string_actions)]
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        known = [name for action in shown for name in action.option_strings if name not in given]
        hints = [f"{option} instead of {name}" for name in unknown if (option := _most_like(name, known))]
        question = f" (did you mean {', '.join(hints)}?)" if hints else ""
        self.exit(2, f"{self.prog}: error: {message}{question}; see --help\n")


def _most_like(name: str, options: Iterable[str]) -> str | None:
    """Return the option with the initials (`--lr`), a word (`--steps`) or about the spelling of `name`; None if none is similar."""
    asked = name.strip("-").replace("-", "_").lower()

    def likeness(option: str) -> float:
        words = option.strip("-").split("_")
        if asked == "".join(word[0] for word in words):
            return 2
        return difflib.SequenceMatcher(None, asked, "_".join(words)).ratio() + (asked in words)

    best = max(options, key=likeness)
    return best if likeness(best) > 0.6 else None


_INTERRUPTED = "interrupted; finished files are kept"


class Removed(argparse.Action):
    """An option of earlier versions: it is not in the help, and using it is an error that says what to do `instead`."""

    def __init__(self, instead: str, **options: Any):
        super().__init__(nargs=0, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options)
        self.instead = instead

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        parser.error(f"{self.option_strings[0]} was removed; {self.instead}")


def run(main: Callable[[], None]) -> None:
    """Call a script's `main`. Errors the user can fix become one line on stderr and a non-zero exit status.

    Scripts call this first to parse their options. An interruption of the imports that follow then prints one line, too, and
    matplotlib is imported without the backend that a notebook exports, which need not be installed where the script runs.
    """
    sys.excepthook = _print_interruption
    if "ipykernel" not in sys.modules:
        os.environ.pop("MPLBACKEND", None)
    try:
        main()
    except UserError as error:
        logger.debug("error: %s", error)  # for log files; sys.exit prints it
        sys.exit(f"error: {error}")
    except UnicodeError:
        sys.exit("error: a name or text on the command line is not valid UTF-8, which models and result files need")
    except (RuntimeError, MemoryError) as error:
        is_torch = type(error).__name__ == "OutOfMemoryError"  # torch's class, which may not be imported
        if not (is_torch or isinstance(error, MemoryError) or "can't allocate memory" in str(error)):
            raise
        sys.exit("error: memory ran out; use a smaller --batch_size, smaller images, or another --device")
    except OSError as error:
        if isinstance(error, FileNotFoundError) and isinstance(error.filename, str) and not Path(error.filename).exists():
            sys.exit(f"error: {not_found('the file', Path(error.filename))}")
        sys.exit(f"error: {error.strerror or error}: {error.filename or 'a file'} could not be read or written")
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _print_interruption(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An excepthook that prints one line for a KeyboardInterrupt, and Python's traceback for other exceptions."""
    if issubclass(kind, KeyboardInterrupt):
        print(_INTERRUPTED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


_LARGEST = 2**63 - 1  # of sizes and counts; seeds, to which rows and copies are added, must stay below 2^64


def number(
    kind: type, low: float, high: float = math.inf, low_open: bool = False, high_open: bool = False
) -> Callable[[str], float]:
    """Return an argparse type: a finite `kind` (int or float) from `low` to `high`; an open end is itself refused."""

    def parse(text: str):
        value = kind(text)
        is_open_end = (low_open and value == low) or (high_open and value == high)
        if not low <= value <= high or abs(value) == math.inf or is_open_end:  # NaN fails the comparison
            raise argparse.ArgumentTypeError(f"{text} is outside its range: {parse.range}")
        return value

    parse.__name__ = kind.__name__
    least = f"above {low}" if low_open else f"{low} or more"
    if high in (math.inf, _LARGEST):
        parse.range = least
    else:
        parse.range = f"{least}, below {high}" if high_open else f"{least}, up to {high}" if low_open else f"{low} to {high}"
    return parse


positive_int = number(int, 1, _LARGEST)
natural = number(int, 0, _LARGEST)


def _named(text: str) -> Path:
    """The path `text`; `.`, `..` and paths that end in `..` become absolute, because files are named after their folder."""
    path = Path(text)
    return path.resolve() if text.strip() and path.name in ("", "..") else path


def folder(text: str) -> Path:
    """An argparse type for an input folder, whose name output files are named after; refuses a blank text and the root folder."""
    path = _named(text)
    if not text.strip() or not path.name:
        raise argparse.ArgumentTypeError(f"{text!r} has no name that files could be named after; name another folder")
    return path


def model_source(text: str) -> str:
    """An argparse type for a model's folder or hub id; `.` and `..` become absolute, because results are named after the model."""
    return str(_named(text)) if text.strip() and Path(text).name in ("", "..") else text


def output_file(text: str) -> Path:
    """An argparse type for a file that will be written; refuses a folder, and a path below a file."""
    path = Path(text)
    if not text.strip() or text.endswith(("/", os.sep)) or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, but a file is written there; name a file")
    return _below_folders(path)


def output_folder(text: str) -> Path:
    """An argparse type for an output folder; refuses a file, and a path below a file."""
    path = _named(text)
    if not text.strip() or (path.exists() and not path.is_dir()):
        raise argparse.ArgumentTypeError(f"{text!r} is a file, but a folder is written there; name a folder")
    return _below_folders(path)


def _below_folders(path: Path) -> Path:
    above = next((parent for parent in path.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise argparse.ArgumentTypeError(f"{str(path)!r} cannot be written, because {above} is a file; name another path")
    return path


def file_stem(text: str) -> str:
    """An argparse type for a file name without folder and suffix."""
    if not text.strip() or text.startswith(".") or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a file name")
    return text


def check_outputs(outputs: Iterable[Path | None], inputs: Iterable[Path | None]) -> None:
    """Raise UserError if an output file is a folder, one of the inputs, or named twice; None stands for no file."""
    read = {path.resolve() for path in inputs if path is not None}
    written: set[Path] = set()
    for path in filter(None, outputs):
        if path.is_dir():
            raise UserError(f"{path} is a folder, but a file is written there; name another output")
        if path.resolve() in read:
            raise UserError(f"{path} would be overwritten, but it is an input or the log; name another output")
        if path.resolve() in written:
            raise UserError(f"{path} would be written twice; name different outputs")
        written.add(path.resolve())


MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # the paper's main model
DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "npu", "xla")
_DEVICE = re.compile(rf"(?:{'|'.join(DEVICES)})(?::\d+)?|\d+")


def device_name(text: str) -> str:
    """An argparse type for the name of a device: `cpu`, `cuda`, `cuda:1`, `mps`, or a bare CUDA index such as `0`."""
    if not _DEVICE.fullmatch(text) or not text.isascii():
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; use cpu, cuda:0, cuda:1, …")
    return f"cuda:{text}" if text.isdigit() else text


def add_device(parser: argparse._ActionsContainer, flag: str = "--device") -> None:
    """Add the device option, whose value `check_device` turns into a torch.device."""
    description = "cpu, cuda:0, … or mps, which is untested (default: the first CUDA device, or cpu if there is none)"
    parser.add_argument(flag, dest="device", type=device_name, metavar="D", help=description)


def check_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Replace `args.device` (a name, or None for the default) by a torch.device, and exit with a usage error if it is unusable.

    In a process of a launcher (`accelerate launch`, torchrun), a CUDA device becomes the one that accelerate gives this process.
    Call this after all other options are checked, because it imports torch.
    """
    import torch

    name = args.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    rank = os.environ.get("LOCAL_RANK", "")
    if name.startswith("cuda") and rank.isdecimal() and os.environ.get("WORLD_SIZE", "1") != "1":
        # As accelerate does; a context on cuda:0 would take memory there for every process.
        name = f"cuda:{int(rank) % max(1, torch.cuda.device_count())}"
    try:
        args.device = torch.device(name)
        torch.empty(0, device=args.device)
    except (RuntimeError, ValueError, OverflowError, AssertionError, NotImplementedError):
        flag = next(action.option_strings[0] for action in parser._actions if action.dest == "device")
        parser.error(f"argument {flag}: {name!r} does not exist, or this PyTorch cannot use it; cpu always works")
    return args


def add_batches(parser: argparse._ActionsContainer, batch_size: int) -> None:
    """Add the options of a scorer that reads images in batches."""
    parser.add_argument("--batch_size", type=positive_int, default=batch_size, metavar="N", help="images per forward pass")
    workers = os.cpu_count() or 4
    parser.add_argument("--num_workers", type=positive_int, default=workers, metavar="N", help="threads that read images ahead")


def add_expected(parser: argparse._ActionsContainer) -> None:
    """Add the option that says how many images a folder must hold."""
    # fmt: off
    parser.add_argument("--expected", type=positive_int, metavar="N", help="number of images that the folder must hold (default: all that its run claims and its prompt list has)")
    # fmt: on


def add_other_prompts(parser: argparse._ActionsContainer) -> None:
    """Add the option for prompts that are not those which drew the images."""
    # fmt: off
    parser.add_argument("--other_prompts", action="store_true", help="score by other prompts than those that drew the images, such as an attack's targets; the result records it")
    # fmt: on


def add_model(parser: argparse._ActionsContainer, default: str | None = MODEL) -> None:
    """Add the options that name a model and choose among its files; the default None stands for the demo's model."""
    # fmt: off
    parser.add_argument("--model_path", type=model_source, action=_ModelPath, default=default, metavar="M", help=f"pipeline, a folder or hub id (default: {default or 'that of the demo'})")
    parser.add_argument("--revision", action=_ModelPath, metavar="R", help="branch, tag or commit of a model on the hub (default: its main branch)")
    parser.add_argument("--variant", metavar="V", help="weights to prefer in each component that has them, such as fp16 for model.fp16.safetensors (default: fp16 for that dtype, else those without a variant)")
    # fmt: on


class _ModelPath(argparse.Action):
    """Joins --model_path M and --revision R, in any order, to `M@R`, the name that is opened and recorded."""

    def __call__(self, parser, namespace, value, option_string=None):
        setattr(namespace, self.dest, value)
        model, suffix = namespace.model_path, f"@{namespace.revision}"
        if namespace.revision and model and not model.endswith(suffix):
            namespace.model_path = model + suffix


def add_drop_t5(parser: argparse._ActionsContainer) -> None:
    """Add the option that leaves out T5."""
    parser.add_argument(
        "--drop_t5", action="store_true", help="SD3: leave out T5 (text encoder 3), whose embeddings become zeros"
    )


def add_encoder_index(parser: argparse._ActionsContainer, name: str = "text_encoder_idx") -> None:
    """Add the option `--{name}` for the number of a text encoder; its other name of the two that scripts use works as well."""
    other = "encoder_idx" if name == "text_encoder_idx" else "text_encoder_idx"
    description = "number of the text encoder in the pipeline, counted from 1"
    parser.add_argument(f"--{name}", type=positive_int, default=1, metavar="I", help=description)
    parser.add_argument(f"--{other}", dest=name, type=positive_int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def add_output_dir(parser: argparse._ActionsContainer, default: str) -> None:
    """Add the option of a scorer for the folder of its results, which need not be where the images are."""
    # fmt: off
    parser.add_argument("--output_dir", type=output_folder, metavar="DIR", help=f"folder for the results and those of unfinished runs, for images that lie in a read-only folder; export.py --scores reads results there, verify.py, report.py and reproduce.py do not (default: {default})")
    # fmt: on


def add_embedding(parser: argparse._ActionsContainer) -> None:
    """Add the options that say how an embedding is read; a codebook and its training must agree on them."""
    # fmt: off
    parser.add_argument("--embedding", choices=("last_hidden_state", "pipeline"), default="last_hidden_state", help="last_hidden_state is the paper's; pipeline is the tensor that the pipeline feeds to its denoiser")
    parser.add_argument("--max_sequence_length", type=positive_int, metavar="N", help="tokens of a T5 prompt (default: its tokenizer's, or the pipeline's with --embedding pipeline: SD3 256, FLUX 512, FLUX.1-schnell 256)")
    # fmt: on


def add_deterministic(parser: argparse._ActionsContainer) -> None:
    """Add the option for results that are the same bit for bit at every run on a GPU."""
    description = "use algorithms that give the same bits in every run; slower on CUDA"
    parser.add_argument("--deterministic", action="store_true", help=description)


def add_log_file(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the group with the option for a copy of the log."""
    group = parser.add_argument_group("log")
    # fmt: off
    group.add_argument("--log_file", type=output_file, metavar="F", help="add the log lines to this file too, with more details")
    # fmt: on
    return group


def make_deterministic() -> None:
    """Use deterministic algorithms only. Call this before the first matrix product on a GPU, which starts cuBLAS."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
