"""Image files: their names, and how they are read safely and in batches."""

import math
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from des.utils.errors import UserError
from des.utils.logs import progress

import numpy as np
from PIL import Image, UnidentifiedImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".pgm", ".ppm")  # those that pytorch-fid counts
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "TIFF",
    "PPM",
)  # nothing else is tried: for one of its formats Pillow starts Ghostscript
LONGEST = 100  # times its shorter side; the models' processors enlarge the shorter side to hundreds of pixels
WORKERS = 4
_ONE_COLOUR = 8  # levels of 255 that compression may add to one grey
BLURRED = ("des", "blurred")  # the mark in a PNG that is no image to score
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `read_image` makes it an error
_ROW = re.compile(r"_(\d+)p(?:_(\d+))?\.[a-z]+$", re.IGNORECASE)


def image_name(output_name: str, method: str, row: int, copy: int = 0) -> str:
    """The file name of an image of prompt row `row`, `{output}_{method}_{row}p.png`; its further images end in `p_{copy}.png`."""
    return f"{output_name}_{method}_{row}p{f'_{copy}' if copy else ''}.png"


def row_of(path: Path) -> int | None:
    """The prompt row in an image's file name, or None where it names none."""
    key = row_and_copy(path)
    return key and key[0]


def row_and_copy(path: Path) -> tuple[int, int] | None:
    """The prompt row and the copy in an image's file name, or None where it has none."""
    match = _ROW.search(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def read_image(path: Path) -> Image.Image:
    """Read a whole image as 8-bit RGB, whatever its name says of its format.

    Grey, palette and CMYK are converted, 16 bits keep their high byte, transparency is dropped (the colours beneath it stay), and
    orientation marks are not followed. Raises UserError that names a file which is truncated, no image of FORMATS, animated,
    larger than Pillow's limit (89 megapixels), more than LONGEST times as long as wide, or without a known white.
    """
    return _read(path, _rgb)


def read_mask(path: Path) -> Image.Image:
    """Read a whole image as an 8-bit grey mask: what is painted, in white or only in the alpha channel, is bright.

    Where opaque pixels have one colour, the alpha channel holds the shape. Raises UserError as `read_image` does, and where
    colours and alpha channel each hold a shape.
    """
    return _read(path, _mask)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the file's header; UserError as `read_image` raises it for the header."""
    return _read(path, lambda image: image.size)


def _read(path: Path, convert: Callable[[Image.Image], Any]) -> Any:
    """What `convert` makes of an opened image; UserError as `read_image` says."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check(image)
            return convert(image)
    except UnidentifiedImageError:
        reason = f"it is none of {', '.join(FORMATS)}"
    except Exception as error:  # damaged bytes raise errors of any class in Pillow
        reason = (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]
    raise UserError(f"{path} is no readable image: {reason}")


def _check(image: Image.Image) -> None:
    """Raise ValueError for an opened image whose pixels must not be read."""
    if image.info.get(BLURRED[0]) == BLURRED[1]:
        raise ValueError("it is a blurred thumbnail, not what was drawn")
    width, height = image.size
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"its {width}x{height} pixels are more than the limit of {Image.MAX_IMAGE_PIXELS}")
    if max(width, height) > LONGEST * min(width, height):
        raise ValueError(f"it is {width}x{height} pixels, one side more than {LONGEST} times the other")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's JPEG with a preview behind the picture
        raise ValueError(f"it has {frames} frames, and a score is about one")


def _mask(image: Image.Image) -> Image.Image:
    """Convert to grey by the rule of `read_mask`; ValueError where it does not say which shape is meant."""
    grey = _rgb(image).convert("L")
    if not image.has_transparency_data:
        return grey
    alpha = image.convert("RGBA").getchannel("A")
    least, most = alpha.getextrema()
    if least == most > 0:
        return grey
    opaque = np.asarray(grey)[np.asarray(alpha) == most]
    if int(opaque.max()) - int(opaque.min()) > _ONE_COLOUR:
        raise ValueError("its colours and its alpha channel each hold a shape; save the mask without transparency")
    return alpha


def _rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB; 16-bit grey by its high byte, as Pillow reads 16-bit colour (`convert` would turn all above 255 white)."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers, of which none is known to be white; save it with 8 or 16 bits")
    return image.convert("RGB")


def is_complete(path: Path) -> bool:
    """Whether `path` is there and can be read to its last pixel."""
    try:
        read_image(path)
    except UserError:
        return False
    return True


def image_batches(
    paths: list[Path],
    batch_size: int,
    desc: str,
    workers: int = WORKERS,
    prepare: Callable[[Image.Image], Any] | None = None,
    unreadable: list[Path] | None = None,
) -> Iterator[list]:
    """Read images in batches, in order, the next one decoded and given to `prepare` by threads while this one is used.

    An unreadable image is a UserError; where a list `unreadable` is given it is added there instead, and its batch is shorter.
    """

    def read(path: Path) -> Any:
        image = read_image(path)
        return prepare(image) if prepare else image

    def submit(start: int) -> list[tuple[Path, Future]]:
        return [(path, pool.submit(read, path)) for path in paths[start : start + batch_size]]

    with ThreadPoolExecutor(workers) as pool, progress(None, desc=desc, total=len(paths), unit="image") as bar:
        ahead = submit(0)
        for start in range(0, len(paths), batch_size):
            batch, ahead = ahead, submit(start + batch_size)
            items = []
            for path, future in batch:
                try:
                    items.append(future.result())
                except UserError:
                    if unreadable is None:
                        pool.shutdown(cancel_futures=True)
                        raise
                    unreadable.append(path)
            yield items
            bar.update(len(batch))
