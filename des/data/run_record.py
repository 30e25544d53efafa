"""run.json: the settings that determine a folder's images; runs with other settings are refused."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from des.data import claims, manifest
from des.data.prompts import never_drawn
from des.utils.errors import UserError
from des.utils.files import sha256_texts, write_json
from des.utils.folders import visible
from des.utils.locks import locked

Lines = dict[str, dict[str, Any]]  # of a manifest, by file name
FORMAT = 2  # of run.json; records without a number are of the first, which names no components of the model
_COMPONENTS = "components"  # of the settings in run.json: the identity of each component of the pipeline, by its name
RECORD_FIELDS = (_COMPONENTS, "format")  # of the settings, which say nothing of how images are drawn
_BROKEN = (ValueError, KeyError, TypeError, AttributeError)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} cannot be read as a JSON object; make it again")
    return content


def read_run(folder: Path) -> tuple[dict[str, Any], Lines]:
    """run.json and the manifest's lines; UserError where they are missing or do not belong together."""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        digest = sha256_texts([json.dumps(run["settings"], sort_keys=True)])
        run["made_by"]["arguments"].items()
        version = int(run.get("format", 1))
    except FileNotFoundError:
        raise UserError(f"{folder} has no run.json, so nothing says how its images were made") from None
    except _BROKEN:
        raise UserError(f"{folder / 'run.json'} cannot be read") from None
    if version > FORMAT:
        raise UserError(f"{folder / 'run.json'} was written by a later version of this program")
    lines = manifest.read(folder)
    if not lines:
        raise UserError(f"{folder} has no {manifest.NAME}")
    other = sorted(name for name, line in lines.items() if line.get("settings_sha256") != digest)
    if other:
        raise UserError(f"{len(other)} images in {folder} were made by other settings than run.json's, {other[0]} first")
    return run, lines


def recorded_components(record: Mapping[str, Any]) -> dict[str, str]:
    """The recorded identity of each component of the pipeline (unet, vae, ...); empty for a record of an earlier release."""
    found = record["settings"].get(_COMPONENTS) or {}
    return {name: json.dumps(value, sort_keys=True) for name, value in found.items()}


COPY_SEED = 1_000_003  # between the seeds of a row's images
ROW_COLUMNS = {  # of prompt sets that say how their images were drawn: I2P, UnlearnDiffAtk, COCO lists, the demo
    "seed": ("sd_seed", "evaluation_seed", "seed"),
    "guidance_scale": ("sd_guidance_scale", "evaluation_guidance", "guidance_scale"),
    "width": ("sd_image_width", "width"),
    "height": ("sd_image_height", "height"),
}


@dataclass(frozen=True)
class Sampling:
    """The options that decide an image's pixels, beside its model, prompt, input images and row.

    run.json holds them by these names, and a name that an older record lacks has its default here; so a further field needs one
    that draws as before. Guidance and size are those of rows that bring none of their own.
    """

    seed: int
    num_inference_steps: int
    guidance_scale: float
    height: int | None = None  # pixels; None for the model's
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
        """The sampling among a command line's options by name, after defaults were filled in."""
        return cls(**{field.name: options[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class RowSettings:
    """How one row is drawn."""

    seed: int
    guidance_scale: float
    width: int
    height: int


SINCE_2 = ("components", "scheduler_sha256")  # what records of the first format lack
LABELS = ("model_path", "base_model_path", "refiner_path")  # where models lie; their components are compared instead


def claim(
    folder: Path,
    made_by: dict[str, Any],
    prompts: list[str],
    settings: dict[str, Any],
    applied: dict,
    keys: Iterable[tuple[int, int]],
    truncated: dict[str, Any],
) -> None:
    """Write run.json, or raise UserError when `folder` holds images that other settings made.

    A resumed run keeps the settings as they were first recorded (`recorded_settings`), since the manifest's lines name their
    hash: the same model may be found at another path now, and an older record knows less. The record claims
    the images that this run draws (`keys`: row and copy) beside those that earlier runs and shards claimed.
    """
    with locked(folder / ".run.lock", "its record", wait=True):
        earlier = _earlier(folder, json.loads(json.dumps(settings, default=str)))
        facts = {"settings": settings, "protection": applied, "left_out": never_drawn(prompts)}
        facts |= {"truncated_prompts": truncated, "made_by": made_by}
        claimed = claims.claimed_keys(folder, earlier | {"left_out": facts["left_out"]}) | set(keys)
        facts["claimed"] = claims.packed(claimed)
        kept = {name: earlier[name] for name in ("format", "settings", "last_drawn") if name in earlier}
        write_json(folder / "run.json", {"format": FORMAT, **facts} if not earlier else {**facts, **kept})


def recorded_settings(folder: Path) -> dict[str, Any]:
    """The settings in a folder's run.json, after `claim`."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]


def _earlier(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What run.json said before, if anything; UserError where it was of other settings, or cannot be read."""
    path = folder / "run.json"
    if not path.exists():
        if visible(folder, "*p*.*"):
            raise UserError(f"{folder} holds images of unknown origin (no run.json); choose another --output_path")
        return {}
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        before, version = dict(earlier["settings"]), int(earlier.get("format", 1))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} cannot be read, so the images beside it are of unknown origin; choose another --output_path"
        ) from None
    if version > FORMAT:
        raise UserError(f"{path} was written by a later version of this program; choose another --output_path")
    changed = _changes(before, settings, SINCE_2 if version < 2 else LABELS)
    if changed:
        raise UserError(
            f"{folder} holds images of another run, with another {', '.join(changed)}; choose another --output_path"
        )
    return earlier


def _changes(before: dict[str, Any], settings: dict[str, Any], skipped: tuple[str, ...]) -> list[str]:
    """The settings that differ, each with both values, but for those of no account; one that is absent has its default."""
    defaults = {field.name: field.default for field in fields(Sampling)}
    old, new = ({name: value for name, value in each.items() if name not in skipped} for each in (before, settings))
    for each in (old, new):
        for name, digest in (each.pop("components", None) or {}).items():
            each[f"component {name}"] = digest[:12]
    pairs = {name: (old.get(name, defaults.get(name)), new.get(name, defaults.get(name))) for name in old | new}
    return [f"{name} ({a}, now {b})" for name, (a, b) in pairs.items() if a != b and (a or b) is not False]
