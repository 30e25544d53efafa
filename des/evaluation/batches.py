"""The scoring loop. A metric of single images is one function that `measure_images` calls batch by batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from des.data.images import image_batches
from des.utils.logs import logger
from des.utils.resume import Findings

import torch
from PIL import Image


class Item(NamedTuple):
    """An image to measure: the key under which its finding is stored, its file, and its target (a prompt, a label or an image)."""

    key: str
    path: Path
    target: Any = None


@dataclass(frozen=True)
class Reading:
    """How images are read: the batch size, the number of reader threads, and the label of the progress bar."""

    batch_size: int
    workers: int
    desc: str = "score"


def measure_images(
    items: Sequence[Item],
    measure: Callable[[list, list[Any]], list[Any]],
    findings: Findings,
    reading: Reading,
    prepare: Callable[[Image.Image], Any] | None = None,
    unreadable: list[Path] | None = None,
) -> list[Any]:
    """Measure every readable image and return the findings in order; images that are already in `findings` are skipped.

    `measure` takes a batch of RGB images (or the results of `prepare`, which runs in the reader threads) and their targets. It
    returns one finding per image, as JSON values. An unreadable image raises UserError, or is appended to `unreadable` if given.
    """
    todo = list({item.key: item for item in items if item.key not in findings.found}.values())
    done = sum(item.key in findings.found for item in items)
    if done:
        logger.info("%s: %d of %d images were scored before", reading.desc, done, len(items))
    skipped = [] if unreadable is None else unreadable
    size, paths = reading.batch_size, [item.path for item in todo]
    batches = image_batches(paths, size, reading.desc, reading.workers, prepare, unreadable)
    for start, images in zip(range(0, len(todo), size), batches, strict=True):
        batch = [item for item in todo[start : start + size] if item.path not in skipped]
        if batch:
            with torch.inference_mode():
                found = measure(images, [item.target for item in batch])
            findings.add(dict(zip([item.key for item in batch], found, strict=True)))
    return [findings.found[item.key] for item in items if item.path not in skipped]
