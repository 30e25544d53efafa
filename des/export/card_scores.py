"""Scores for a model card: checks of which model drew the scored images, and a table row for each figure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from des.data.run_record import Lines, read_json, read_run
from des.evaluation.results import FOLDER_OPTIONS, Score, read_score
from des.models.checkpoints import plain_names
from des.models.model_files import model_name
from des.models.pipelines import DTYPES
from des.utils.errors import UserError, not_found
from des.utils.files import sha256_tensors

from torch import nn

HEAD = ("measure", "variant", "detector or model", "prompt set", "method", "figure")
_NETWORKS = [  # the hashes of a detector's or model's weights in results
    f"{name}_sha256" for name in ("weights", "prompts", "classifier", "extractor", "net", "model", "clip")
]
_OTHER_CAUSES = {"negative_prompt": "a negative prompt", "strength": "start images", "use_refiner": "a refiner"}  # by setting
_NAMES = ("classifier", "weights", "prompts_file", "net")  # of a detector or a model, in results


@dataclass(frozen=True)
class Measured:
    """A scorer's figure, with the run that drew the images."""

    score: Score
    run: Mapping[str, Any]  # run.json
    lines: Lines  # of the manifest

    @property
    def method(self) -> str:
        return str(self.run["settings"].get("training_method") or self.run["made_by"]["arguments"].get("training_method"))

    def row(self) -> tuple[str, ...]:
        """Return the cells under HEAD; recorded names are not escaped."""
        content, made_by = self.score.content, self.run["made_by"]["arguments"]
        detector = content.get("detector") or content
        measure, _, variant = self.score.title.partition(" (")
        kind = {"asr": "images that count: ", "accuracy": "images that show what they should: "}.get(self.score.kind, "")
        named = Path(next((str(detector[name]) for name in _NAMES if detector.get(name)), "")).name
        digests = [str(detector[name])[:8] for name in _NETWORKS if name in detector]  # two for the BLIP score
        prompts = Path(str(made_by.get("prompts_csv") or "one prompt")).name
        model = model_name(str(made_by.get("model_path")))
        return (
            kind + measure, variant.removesuffix(")") or "-", " ".join(filter(None, (named, *digests))) or "-",
            f"{Path(str(made_by.get('output_path'))).name} ({prompts})", f"{self.method} on {model}", figure(self.score),
        )  # fmt: skip


def figure(score: Score) -> str:
    """Format a figure with its 95% interval and counts: `3/60 = 5.0% [1.7, 13.7]` or `26.51 [26.10, 26.90], 60 images`."""
    interval = None if score.low is None or score.high is None else (score.low, score.high)
    if score.kind in ("asr", "accuracy"):
        return f"{score.counts} = {score.value:.1f}%" + (" [{:.1f}, {:.1f}]".format(*interval) if interval else "")
    digits = 4 if score.kind in ("kid", "lpips") else 2
    shown = [f"{value:.{digits}f}" for value in (score.value, *(interval or ()))]
    return shown[0] + (f" [{', '.join(shown[1:])}]" if interval else "") + f", {score.counts}"


def read_measured(paths: Iterable[Path]) -> list[Measured]:
    """Read the figures of scorers' JSON results, in order.

    Raises UserError for a file that is not a result, does not match the images in its folder, or has no run.json.
    """
    measured = []
    for path in paths:
        if not path.is_file():
            raise not_found("the file of scores", path)
        run, lines = read_run(_folder_of(path))
        measured += [Measured(score, run, lines) for score in read_score(path, lines)]
    return measured


def _folder_of(path: Path) -> Path:
    """Return the folder of a result's images: the folder of the result itself, or the one recorded in it."""
    made_by = read_json(path).get("made_by")
    arguments = made_by.get("arguments") if isinstance(made_by, dict) else None
    named = [arguments.get(name) for name in FOLDER_OPTIONS] if isinstance(arguments, dict) else []
    beside = [
        path.parent / Path(folder).name for folder in named if isinstance(folder, str)
    ]  # for fid.py's results after a move
    folders = [path.parent, *beside, *(Path(folder) for folder in named if isinstance(folder, str))]
    found = next((folder for folder in folders if (folder / "run.json").is_file()), None)
    if found is None:
        raise UserError(
            f"it is unknown which model drew the images of {path}: there is no run.json of generate.py beside it or in the folder "
            "that it names; pass scores of images drawn by generate.py"
        )
    return found


def check_drawn_by(measured: Sequence[Measured], encoders: Mapping[int, tuple[str, nn.Module]]) -> None:
    """Raise UserError unless all scored images were drawn by a pipeline with exactly these protected encoders.

    `encoders` has the subfolder and the model of each by 1-based index, in the dtype in which they were loaded; images may be
    drawn in any of DTYPES. Otherwise, a card could show figures of another model, as it could of runs with a negative prompt, start
    images or a refiner, which are refused as well.
    """
    accepted = {subfolder: _fingerprints(model) for subfolder, model in encoders.values()} if measured else {}
    for each in measured:
        subject = f"{each.score.path} is about images of"
        if each.method == "none":
            raise UserError(f"{subject} the original model, but the card is for the protected one; pass scores of its images")
        others = [what for name, what in _OTHER_CAUSES.items() if each.run["settings"].get(name)]
        if others:
            reason = f"a run with {' and '.join(others)}, so their figures are not the encoder's alone"
            raise UserError(f"{subject} {reason}; pass scores of images drawn without")
        protected = {str(i) for i in each.run.get("protection") or {} if str(i).isdigit()}
        if protected != {str(i) for i in encoders}:
            which = " and ".join(sorted(protected)) or "none"
            raise UserError(f"{subject} {each.method} with other protected text encoders ({which}) than the exported ones")
        for subfolder, digests in accepted.items():
            name = f"{subfolder}_sha256"
            drawn = {line.get(name, each.run["settings"].get(name)) for line in each.lines.values()}
            if not drawn <= digests:
                raise UserError(f"{subject} another {subfolder} than the exported one; score images drawn with this checkpoint")


def _fingerprints(model: nn.Module) -> set[str]:
    """Return an encoder's `des.models.checkpoints.fingerprint` in each dtype of pipelines."""
    state = plain_names(model.state_dict())
    return {sha256_tensors({name: tensor.to(dtype) for name, tensor in state.items()}) for dtype in DTYPES.values()}
