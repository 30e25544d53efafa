"""run.json: the settings that determine a folder's images; runs with other settings are refused."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from des.data import claims, manifest
from des.data.prompts import never_drawn
from des.utils.errors import UserError, not_found
from des.utils.files import sha256_texts, write_json
from des.utils.folders import visible
from des.utils.locks import locked

Lines = dict[str, dict[str, Any]]  # of a manifest, by file name
FORMAT = 2  # of run.json; records without the entry have format 1, which lacks the components of the model
_COMPONENTS = "components"  # the setting with the identity of each component of the pipeline, by name
RECORD_FIELDS = (_COMPONENTS, "format")  # entries among the settings that are not options of drawing
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
    """Write run.json, or raise UserError if `folder` has images drawn with other settings.

    A resumed run keeps the settings as first recorded, because the manifest's lines contain their hash, and the model may have
    been moved since. The record claims the images that this run draws (`keys`: row and copy) and those of earlier runs and shards.
    """
    with locked(folder / ".run.lock", "its record", wait=True):
        earlier = _earlier(folder, json.loads(json.dumps(settings, default=str)))
        facts = {
            "settings": settings,
            "protection": applied,
            "left_out": never_drawn(prompts, negative_prompt=settings.get("negative_prompt")),
        }
        facts |= {"truncated_prompts": truncated, "made_by": made_by}
        claimed = claims.claimed_keys(folder, earlier | {"left_out": facts["left_out"]}) | set(keys)
        facts["claimed"] = claims.packed(claimed)
        kept = {name: earlier[name] for name in ("format", "settings", "last_drawn") if name in earlier}
        write_json(folder / "run.json", {"format": FORMAT, **facts} if not earlier else {**facts, **kept})


def recorded_settings(folder: Path) -> dict[str, Any]:
    """Return the settings in a folder's run.json; call `claim` first."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]


def _earlier(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the existing run.json, empty if there is none; UserError if its settings differ or it cannot be read."""
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
        raise UserError(f"{path} cannot be read, so its images are of unknown origin; choose another --output_path") from None
    if version > FORMAT:
        raise UserError(f"{path} was written by a later version of this program; choose another --output_path")
    changed = _changes(before, settings, SINCE_2 if version < 2 else LABELS)
    if changed:
        raise UserError(
            f"{folder} contains images of a run with different settings: {', '.join(changed)}; choose another --output_path"
        )
    return earlier


def _changes(before: dict[str, Any], settings: dict[str, Any], skipped: tuple[str, ...]) -> list[str]:
    """Describe each setting that differs, with both values, except those `skipped`; an absent setting has its default."""
    defaults = {field.name: field.default for field in fields(Sampling)}
    old, new = ({name: value for name, value in each.items() if name not in skipped} for each in (before, settings))
    for each in (old, new):
        for name, digest in (each.pop("components", None) or {}).items():
            each[f"component {name}"] = digest[:12]
    pairs = {name: (old.get(name, defaults.get(name)), new.get(name, defaults.get(name))) for name in old | new}
    return [f"{name} ({a}, now {b})" for name, (a, b) in pairs.items() if a != b and (a or b) is not False]
