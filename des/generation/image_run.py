"""The record of a folder of images: all that decides what they look like, so that no two runs mix in one folder."""

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from des.data import manifest
from des.data.image_folders import image_files
from des.data.run_record import COPY_SEED, LABELS, RowSettings, Sampling
from des.evaluation.classify import ImageScores, save_blurred
from des.generation.sampler import Artist
from des.models.identity import scheduler_sha256, sha256_of
from des.models.pipelines import component_identities, encoder_sha256s
from des.utils.files import replacing, sha256_file, sha256_texts, write_json
from des.utils.locks import locked

from diffusers import DiffusionPipeline
from PIL import Image


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

    def is_done(self, key: tuple[int, int], found: dict[str, dict[str, Any]], cards: ImageScores) -> bool:
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
            manifest.append(self.folder, line)
            return line
        with replacing(path) as temporary:
            image.save(temporary, format="PNG")
            line["sha256"] = sha256_file(temporary)
            manifest.append(self.folder, line)
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
