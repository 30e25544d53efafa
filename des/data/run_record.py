"""run.json: the settings that determine a folder's images; runs with other settings are refused."""

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Self

from des.data import claims, manifest
from des.data.prompts import never_drawn
from des.utils.errors import UserError, not_found
from des.utils.files import sha256_texts, write_json
from des.utils.folders import visible
from des.utils.locks import locked

Lines = dict[str, dict[str, Any]]  # of a manifest, by file name
ROWS_LOCK = ".rows.lock"  # on it, a process that draws locks a byte for each of its rows
FORMAT = 2  # of run.json; records without the entry have format 1, which lacks the components of the model
_COMPONENTS = "components"  # the setting with the identity of each component of the pipeline, by name
RECORD_FIELDS = (_COMPONENTS, "format")  # entries among the settings that are not options of drawing
MODEL_FILES = ("text_encoder", "text_encoder_2", "text_encoder_3", "unet", "adapter")  # settings hash them as `unet_sha256`
ROUNDING = "deterministic"  # changes only the rounding of images, so it may differ between compared runs
_OF_IMAGES = (  # settings of a run that its manifest and its images hold for each image
    "seed", "guidance_scale", "width", "height", "use_row_settings", "row_settings_sha256", "prompts_sha256",
)  # fmt: skip
MALFORMED = (ValueError, KeyError, TypeError, AttributeError)  # what reading a JSON file of another form raises


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; UserError if the file cannot be read or contains something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be read as a JSON object; create it again")
    return content


def read_run(folder: Path) -> tuple[dict[str, Any], Lines]:
    """Return run.json and the manifest's lines; UserError if they are missing or do not belong together."""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        digest = sha256_texts([json.dumps(run["settings"], sort_keys=True)])
        run["made_by"]["arguments"].items()
        version = int(run.get("format", 1))
    except (FileNotFoundError, NotADirectoryError):
        if not folder.is_dir():
            raise not_found("the image folder", folder, "generate.py draws images") from None
        inside = sorted(str(path.parent) for path in folder.rglob("run.json"))[:5]
        advice = f"name one run, such as {', '.join(inside)}" if inside else "draw them with generate.py"
        raise UserError(f"{folder} has no run.json, so it is unknown how its images were drawn; {advice}") from None
    except MALFORMED:
        raise UserError(f"{folder / 'run.json'} cannot be read; draw the images again") from None
    if version > FORMAT:
        raise UserError(f"{folder / 'run.json'} was written by a later version of this program")
    lines = manifest.read(folder)
    if not lines:
        raise UserError(f"{folder} has no {manifest.NAME}; draw the images again")
    other = sorted(name for name, line in lines.items() if line.get("settings_sha256") != digest)
    if other:
        raise UserError(f"{len(other)} images in {folder} were drawn with settings other than run.json's, {other[0]} first")
    return run, lines


def recorded_components(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the recorded identity of each component of the pipeline (unet, vae, ...); empty for records of earlier versions."""
    found = record["settings"].get(_COMPONENTS) or {}
    return {name: json.dumps(value, sort_keys=True) for name, value in found.items()}


def of_model(name: str) -> bool:
    """Whether a setting is the hash of a file that a method loads into the pipeline: a text encoder, UNet or adapter."""
    return name.endswith("_sha256") and name.removesuffix("_sha256") in MODEL_FILES


def conditions_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Select the settings that compared runs must share: sampling, scheduler, and hashes of prompts and input images.

    A setting that is missing in an older record has its default value.
    """
    defaults = {each.name: None if each.default is MISSING else each.default for each in fields(Sampling)}
    names = [name for name in settings if name.endswith("_sha256") and not of_model(name)]
    values = {name: settings.get(name, defaults.get(name)) for name in (*defaults, "scheduler", *names)}
    return {name: value for name, value in values.items() if name != ROUNDING and name not in SINCE_2}


def later_conditions_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Select conditions that earlier records lack; they are compared only if both runs have them."""
    return {name: settings[name] for name in (*SINCE_2, TORCH) if name not in RECORD_FIELDS and name in settings}


def differing_conditions(protected: Mapping[str, Any], original: Mapping[str, Any]) -> list[str]:
    """Name what differs in two records' settings and original models, besides what each image's line of the manifest holds.

    `protected` and `original` are the contents of run.json for images of the protected and of the original model. Two kinds of
    identities are not compared: those that only one record has, and those of components that the protected model's method changes.
    """
    mine, theirs = protected["settings"], original["settings"]
    old, new = conditions_of(theirs), conditions_of(mine)
    differ = [name for name in old | new if name not in _OF_IMAGES and old.get(name) != new.get(name)]
    later = later_conditions_of(theirs), later_conditions_of(mine)
    parts = recorded_components(original) | _encoders(original), recorded_components(protected) | _encoders(protected)
    changed = {"unet"} if mine.get("unet_sha256") or mine.get("adapter_sha256") else set()
    changed |= {f"text_encoder{'' if str(i) == '1' else f'_{i}'}" for i in protected.get("protection") or {}}
    if mine.get("base_model_path"):  # SafeGen's pipeline is another one
        changed |= parts[0].keys()
    differ += [name for name in later[0].keys() & later[1].keys() if later[0][name] != later[1][name]]
    return differ + sorted(name for name in (parts[0].keys() & parts[1].keys()) - changed if parts[0][name] != parts[1][name])


def _encoders(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the recorded hash of each text encoder by the component's name."""
    hashes = {
        name.removesuffix("_sha256"): str(value) for name, value in record["settings"].items() if of_model(name) and value
    }
    return {name: value for name, value in hashes.items() if name.startswith("text_encoder")}


COPY_SEED = 1_000_003  # difference between the seeds of a row's copies
ROW_COLUMNS = {  # columns of prompt sets with settings for each row: I2P, UnlearnDiffAtk, COCO lists, the demo
    "seed": ("sd_seed", "evaluation_seed", "seed"),
    "guidance_scale": ("sd_guidance_scale", "evaluation_guidance", "guidance_scale"),
    "width": ("sd_image_width", "width"),
    "height": ("sd_image_height", "height"),
}


@dataclass(frozen=True)
class Sampling:
    """The options that determine an image's pixels, besides its model, prompt, input images and row.

    run.json stores them under these names. A name that an older record lacks has the default given here, so a new field's default
    must draw as before. Guidance and size apply to rows that do not set them.
    """

    seed: int
    num_inference_steps: int
    guidance_scale: float
    height: int | None = None  # pixels; None for the model's default
    width: int | None = None
    negative_prompt: str | None = None
    strength: float | None = None
    max_sequence_length: int | None = None
    use_row_settings: bool = False
    use_refiner: bool = False
    high_noise_frac: float | None = None
    dtype: str | None = None
    deterministic: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Select these options from a command line's options by name, in which defaults are filled in."""
        return cls(**{field.name: options[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class RowSettings:
    """The settings of one row."""

    seed: int
    guidance_scale: float
    width: int
    height: int


SINCE_2 = ("components", "scheduler_sha256")  # settings that records of format 1 lack
TORCH = "torch"  # the setting with torch's release, which decides the pixels in half precision only; records in fp32 lack it
LABELS = ("model_path", "base_model_path", "refiner_path")  # paths, which are not compared: models may be moved


def claim(
    folder: Path,
    made_by: dict[str, Any],
    prompts: list[str],
    settings: dict[str, Any],
    applied: dict,
    keys: Iterable[tuple[int, int]],
    truncated: dict[str, Any],
) -> None:
    """Write run.json, or raise UserError if `folder` has images drawn with other settings, or another process is drawing them.

    The record of a run that failed before its first image is replaced. A resumed run keeps the settings as first recorded, because the manifest's lines contain their hash, and the model may have
    been moved since. The record claims the images that this run draws (`keys`: row and copy) and those of earlier runs and shards.
    """
    with locked(folder / ".run.lock", "its record", wait=True):
        keys = set(keys)
        earlier = _earlier(folder, json.loads(json.dumps(settings, default=str)), {row for row, _ in keys})
        never = never_drawn(prompts, negative_prompt=settings.get("negative_prompt"))
        facts = {"settings": settings, "protection": applied, "left_out": never}
        facts |= {"truncated_prompts": truncated, "made_by": made_by}
        claimed = claims.claimed_keys(folder, earlier | {"left_out": facts["left_out"]}) | keys
        facts["claimed"] = claims.packed(claimed)
        kept = {name: earlier[name] for name in ("format", "settings", "last_drawn") if name in earlier}
        write_json(folder / "run.json", {"format": FORMAT, **facts} if not earlier else {**facts, **kept})


def recorded_settings(folder: Path) -> dict[str, Any]:
    """Return the settings in a folder's run.json; call `claim` first."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]


def _earlier(folder: Path, settings: dict[str, Any], rows: set[int]) -> dict[str, Any]:
    """Return the existing run.json; empty if there is none, or if its settings differ or it cannot be read and nothing was drawn.

    Raises UserError if its settings differ or it cannot be read otherwise. `rows` are those that this process has reserved.
    """
    path = folder / "run.json"
    if not path.exists():
        if visible(folder, "*p*.*"):
            raise UserError(f"{folder} contains images of unknown origin (no run.json); choose another --output_path")
        return {}
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        before, version = dict(earlier["settings"]), int(earlier.get("format", 1))
        if TORCH in settings:  # earlier records have it among their versions only
            before.setdefault(TORCH, earlier["made_by"]["versions"]["torch"].split("+")[0])
    except MALFORMED:
        if _is_unused(folder, rows):
            return {}
        raise UserError(f"{path} cannot be read, so its images are of unknown origin; choose another --output_path") from None
    if version > FORMAT:
        raise UserError(f"{path} was written by a later version of this program; choose another --output_path")
    changed = _changes(before, settings, SINCE_2 if version < 2 else LABELS)
    if changed and _is_unused(folder, rows):
        return {}
    if changed:
        raise UserError(
            f"{folder} contains images of a run with different settings: {', '.join(changed)}; choose another --output_path"
        )
    return earlier


def _is_unused(folder: Path, rows: set[int]) -> bool:
    """Whether a folder has no image of a run, and no other process has reserved rows beyond this one's to draw any."""
    if manifest.read(folder) or visible(folder, "*p*.*") or not rows:
        return False
    below, above = min(rows), max(rows) + 1
    with contextlib.ExitStack() as held:
        try:
            for start, length in ((0, below), (above, 0)):
                if start or length:
                    held.enter_context(locked(folder / ROWS_LOCK, "images", start, length))
        except UserError:
            return False
    return True


def _changes(before: dict[str, Any], settings: dict[str, Any], skipped: tuple[str, ...]) -> list[str]:
    """Describe each setting that differs, with both values, except those `skipped`; an absent setting has its default."""
    defaults = {field.name: field.default for field in fields(Sampling)}
    old, new = ({name: value for name, value in each.items() if name not in skipped} for each in (before, settings))
    for each in (old, new):
        for name, digest in (each.pop("components", None) or {}).items():
            each[f"component {name}"] = digest[:12]
    pairs = {name: (old.get(name, defaults.get(name)), new.get(name, defaults.get(name))) for name in old | new}
    return [f"{name} ({a}, now {b})" for name, (a, b) in pairs.items() if a != b and (a or b) is not False]
