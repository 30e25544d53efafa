"""Drawing into a folder of images: the settings for run.json, the lines of the manifest, and which images are done."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from des.data import manifest
from des.data.image_folders import image_hashes
from des.data.run_record import COPY_SEED, ROWS_LOCK, TORCH
from des.evaluation.classify import ImageScores
from des.generation.defences import Defence
from des.generation.sampler import Sampler
from des.models.identity import scheduler_sha256, sha256_of
from des.models.pipelines import component_identities, encoder_sha256s
from des.utils.files import replacing, sha256_file, sha256_texts, write_json
from des.utils.locks import locked

import torch
from PIL import Image


def settings_of(
    sampler: Sampler,
    defence: Defence,
    refiner_path: str | None,
    input_folders: dict[str, Path],
    discard_images: bool,
    variant: str | None = None,
) -> dict[str, Any]:
    """Return the settings that determine the images: the sampling, and hashes of the model's components, prompts and input images.

    Two kinds of entries do not affect pixels: the paths of `run_record.LABELS`, for readers, and `discard_images`, since a folder
    contains either images or only their scores. `input_folders` has the keys of `Sampler.inputs`; `variant` is that of --variant.
    """
    sampling, pipe = sampler.sampling, sampler.pipe
    settings = {"training_method": defence.method, "model_path": defence.model_path, "base_model_path": defence.base_model_path}
    settings |= {"refiner_path": refiner_path, "discard_images": discard_images, **asdict(sampling)}
    if sampling.use_row_settings:
        settings["row_settings_sha256"] = sha256_texts(map(str, sampler.settings))
    for name, path in (("unet", defence.unet_path), ("adapter", defence.adapter_path)):
        settings[f"{name}_sha256"] = None if path is None else sha256_of(path)
    for name, folder in input_folders.items():
        found = sorted(image_hashes(folder).items())
        settings[f"{name}s_sha256"] = sha256_texts(f"{path.name} {digest}" for path, digest in found)
    if sampling.dtype != "fp32":  # releases of torch draw other noise from one seed in half precision
        settings[TORCH] = torch.__version__.split("+")[0]
    settings |= {"scheduler": type(pipe.scheduler).__name__, "scheduler_sha256": scheduler_sha256(pipe.scheduler)}
    settings["components"] = component_identities(pipe, defence.model_path, sampler.refiner, refiner_path, variant)
    return settings | encoder_sha256s(pipe) | {"prompts_sha256": sha256_texts(sampler.prompts)}


@dataclass(frozen=True)
class RunFolder:
    """A folder of images to draw: the path and the manifest's line of each image, by (row, copy) key."""

    folder: Path
    names: dict[tuple[int, int], Path]
    lines: dict[tuple[int, int], dict[str, Any]]
    discard: bool

    def is_done(self, key: tuple[int, int], found: dict[str, dict[str, Any]], cards: ImageScores) -> bool:
        """Whether the image of a key matches the manifest's lines (`found`) or, if images are discarded, was scored."""
        path, line = self.names[key], found.get(self.names[key].name)
        if line is None or any(line.get(name) != value for name, value in self.lines[key].items()):
            return False
        if self.discard:
            return cards.read(path, line) is not None
        return path.is_file() and sha256_file(path) == line["sha256"]

    def save(self, key: tuple[int, int], image: Image.Image) -> dict[str, Any]:
        """Append the line of a key to the manifest, then save the image unless images are discarded; returns the line."""
        path, line = self.names[key], {**self.lines[key], "sha256": None}
        if self.discard:
            manifest.append(self.folder, line)
            return line
        with replacing(path) as temporary:
            image.save(temporary, format="PNG")
            line["sha256"] = sha256_file(temporary)
            manifest.append(self.folder, line)
        return line


def lines_of(
    sampler: Sampler, names: dict[tuple[int, int], Path], settings: dict[str, Any]
) -> dict[tuple[int, int], dict[str, Any]]:
    """Return the manifest's line of each image, without the image's hash: row, seed, and hashes of prompt, settings and encoders."""
    digest = sha256_texts([json.dumps(settings, sort_keys=True, default=str)])
    encoders = {name: value for name, value in settings.items() if name.startswith("text_encoder") and name.endswith("_sha256")}
    return {
        (row, copy): {
            "file": path.name, "row": row, "copy": copy, "prompt_sha256": sha256_texts([sampler.prompts[row]]),
            "seed": sampler.settings[row].seed + copy * COPY_SEED, "guidance_scale": sampler.settings[row].guidance_scale,
            "width": sampler.settings[row].width, "height": sampler.settings[row].height, "settings_sha256": digest, **encoders,
        }
        for (row, copy), path in names.items()
    }  # fmt: skip


def reserved(folder: Path, rows: list[int]) -> AbstractContextManager[None]:
    """Lock rows of a folder against other processes, which may still draw the rows of other shards."""
    what = f"rows {rows[0]} to {rows[-1]}"
    return locked(folder / ROWS_LOCK, what, rows[0], rows[-1] - rows[0] + 1)


def finish(folder: Path, drawn: int, seconds: float, write_scores: Callable[[], list[str]]) -> None:
    """Record in run.json how long drawing took, write the scores of the whole folder, and print the lines returned."""
    with locked(folder / ".run.lock", "its record", wait=True):
        if drawn:
            facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            write_json(folder / "run.json", facts | {"last_drawn": {"images": drawn, "seconds": seconds}})
        lines = write_scores()
    if lines:
        print("\n".join(lines))
