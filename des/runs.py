"""The record of a folder of images: all that decides what they look like, so that no two runs mix in one folder."""

import argparse
import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from des import claims, manifest
from des.cli import UserError
from des.drawing import COPY_SEED, Artist, RowSettings, Sampling
from des.folders import visible
from des.identity import scheduler_sha256, sha256_of
from des.images import image_files
from des.locks import locked
from des.pipelines import component_identities, encoder_sha256s
from des.prompts import never_drawn
from des.records import FORMAT
from des.results import provenance, replacing, sha256_file, sha256_texts, write_json
from des.scoring import Scorecards, save_blurred

from diffusers import DiffusionPipeline
from PIL import Image

SINCE_2 = ("components", "scheduler_sha256")  # what records of the first format lack
LABELS = ("model_path", "base_model_path", "refiner_path")  # where models lie; their components are compared instead


def settings_of(
    args: argparse.Namespace,
    sampling: Sampling,
    prompts: list[str],
    drawn_with: list[RowSettings],
    pipe: DiffusionPipeline,
    refiner: DiffusionPipeline | None,
    inputs: dict[str, dict[int, Path]],
) -> dict[str, Any]:
    """All that decides what an image looks like: the sampling, and hashes of the model's parts, prompts and input images.

    LABELS are for people. `discard_images` is not about pixels, but a folder has either images or only their scores.
    """
    settings = {"training_method": args.training_method, **{name: getattr(args, name) for name in LABELS}}
    settings |= {"discard_images": args.discard_images, **asdict(sampling)}
    if sampling.use_row_settings:
        settings["row_settings_sha256"] = sha256_texts(map(str, drawn_with))
    for option in ("unet_path", "adapter_path"):
        path = getattr(args, option)
        settings[f"{option.removesuffix('_path')}_sha256"] = None if path is None else sha256_of(path)
    for name in inputs:
        found = sorted(image_files(getattr(args, f"{name}s")))
        settings[f"{name}s_sha256"] = sha256_texts(f"{path.name} {sha256_file(path)}" for path in found)
    settings |= {"scheduler": type(pipe.scheduler).__name__, "scheduler_sha256": scheduler_sha256(pipe.scheduler)}
    settings["components"] = component_identities(pipe, args.model_path, refiner, args.refiner_path)
    return settings | encoder_sha256s(pipe) | {"prompts_sha256": sha256_texts(prompts)}


@dataclass(frozen=True)
class Run:
    """A folder of images in the making: each (row, copy) key with its path and what its line in the manifest will say."""

    folder: Path
    names: dict[tuple[int, int], Path]
    lines: dict[tuple[int, int], dict[str, Any]]
    discard: bool
    blur: bool

    def is_done(self, key: tuple[int, int], found: dict[str, dict[str, Any]], cards: Scorecards) -> bool:
        """Whether the image of a key is there as the manifest's lines (`found`) say, or was scored where none is kept."""
        path, line = self.names[key], found.get(self.names[key].name)
        if line is None or any(line.get(name) != value for name, value in self.lines[key].items()):
            return False
        if self.discard:
            return cards.read(path, line) is not None
        return path.is_file() and sha256_file(path) == line["sha256"]

    def save(self, key: tuple[int, int], image: Image.Image) -> dict[str, Any]:
        """Save the image of a key, unless none is to be kept, after its line in the manifest; returns the line."""
        path, line = self.names[key], {**self.lines[key], "sha256": None}
        if self.blur:
            save_blurred(image, self.folder.with_name(f"{self.folder.name}_blurred") / path.name)
        if self.discard:
            manifest.append(self.folder / manifest.NAME, [line])
            return line
        with replacing(path) as temporary:
            image.save(temporary, format="PNG")
            line["sha256"] = sha256_file(temporary)
            manifest.append(self.folder / manifest.NAME, [line])
        return line


def lines_of(
    artist: Artist, names: dict[tuple[int, int], Path], settings: dict[str, Any]
) -> dict[tuple[int, int], dict[str, Any]]:
    """What the manifest says of each image before it is drawn: its row, prompt, seed, settings and text encoders."""
    digest = sha256_texts([json.dumps(settings, sort_keys=True, default=str)])
    encoders = {name: value for name, value in settings.items() if name.startswith("text_encoder") and name.endswith("_sha256")}
    return {
        (row, copy): {
            "file": path.name, "row": row, "copy": copy, "prompt_sha256": sha256_texts([artist.prompts[row]]),
            "seed": artist.settings[row].seed + copy * COPY_SEED, "guidance_scale": artist.settings[row].guidance_scale,
            "width": artist.settings[row].width, "height": artist.settings[row].height, "settings_sha256": digest, **encoders,
        }
        for (row, copy), path in names.items()
    }  # fmt: skip


def reserved(folder: Path, rows: list[int]) -> AbstractContextManager[None]:
    """Hold the rows of a folder against other processes; those of other shards are free."""
    what = f"rows {rows[0]} to {rows[-1]}"
    return locked(folder / ".rows.lock", what, rows[0], rows[-1] - rows[0] + 1)


def finish(folder: Path, drawn: int, seconds: float, write_scores: Callable[[], list[str]]) -> None:
    """Write what concerns all shards of a folder: the time that drawing took, and the scores, whose lines are printed."""
    with locked(folder / ".run.lock", "its record", wait=True):
        if drawn:
            facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            write_json(folder / "run.json", facts | {"last_drawn": {"images": drawn, "seconds": seconds}})
        lines = write_scores()
    if lines:
        print("\n".join(lines))


def claim(
    folder: Path,
    args: argparse.Namespace,
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
        facts |= {"truncated_prompts": truncated, "made_by": provenance(args)}
        claimed = claims.claimed_keys(folder, earlier | {"left_out": facts["left_out"]}) | set(keys)
        facts["claimed"] = claims.packed(claimed)
        kept = {name: earlier[name] for name in ("format", "settings", "last_drawn") if name in earlier}
        write_json(folder / "run.json", {"format": FORMAT, **facts} if not earlier else {**facts, **kept})


def recorded_settings(folder: Path) -> dict[str, Any]:
    """The settings in a folder's run.json, after `claim`."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]


def _earlier(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What run.json said before, if anything; UserError where it was of other settings, or cannot be told."""
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
