"""Image files: their names, and reading them safely and in batches."""

import io
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
OTHER_SUFFIXES = (
    ".jfif",
    ".jpe",
    ".avif",
    ".heic",
    ".heif",
    ".gif",
    ".apng",
    ".jxl",
    ".jp2",
    ".tga",
    ".exr",
)  # images, not read
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")  # no others, since Pillow starts Ghostscript for EPS
LONGEST = 100  # largest ratio of the sides; the models' processors enlarge the shorter one to hundreds of pixels
WORKERS = 4
_ONE_COLOUR = 8  # levels of 255 by which compression may vary a single grey
BLURRED = ("des", "blurred")  # the PNG text chunk of blurred thumbnails, which must not be scored
_COMPRESSED = (b"zTXt", b"iTXt", b"iCCP")  # PNG chunks with text or a colour profile
_SHORT = 1024  # bytes of a text chunk that is always read, as BLURRED
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `read_image` raises an error instead
_ROW = re.compile(r"_(\d+)p(?:_(\d+))?\.[a-z]+$", re.IGNORECASE)


def image_name(output_name: str, method: str, row: int, copy: int = 0) -> str:
    """Return the file name of an image of a prompt row: `{output}_{method}_{row}p.png`, or `..._{row}p_{copy}.png` for copy > 0."""
    return f"{output_name}_{method}_{row}p{f'_{copy}' if copy else ''}.png"


def row_of(path: Path) -> int | None:
    """Return the prompt row in an image's file name, or None."""
    key = row_and_copy(path)
    return key and key[0]


def row_and_copy(path: Path) -> tuple[int, int] | None:
    """Return the prompt row and the copy in an image's file name, or None."""
    match = _ROW.search(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def read_image(path: Path) -> Image.Image:
    """Read a whole image as 8-bit RGB; its content, not its suffix, determines the format.

    Grey, palette and CMYK images are converted, 16-bit values keep their high byte, the alpha channel is dropped, and EXIF
    orientation is ignored. Raises UserError for a file that is truncated, animated, not in FORMATS, larger than Pillow's limit
    (89 megapixels), more than LONGEST times as long as wide, or has 32-bit pixels.
    """
    return _read(path, _rgb)


def read_mask(path: Path) -> Image.Image:
    """Read a whole image as an 8-bit grey mask in which the region to draw is bright.

    If all opaque pixels have one colour, the mask is the alpha channel; otherwise it is the image in grey. Raises UserError as
    `read_image` does, and if both the colours and the alpha channel contain a shape.
    """
    return _read(path, _mask)


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height in pixels from the file's header; raises UserError as `read_image` does for headers."""
    return _read(path, lambda image: image.size)


def _read(path: Path, convert: Callable[[Image.Image], Any]) -> Any:
    """Open an image, check it and return `convert(image)`; raises UserError as `read_image` does."""

    def read(source: Path | io.BytesIO) -> Any:
        with Image.open(source, formats=FORMATS) as image:
            _check(image)
            return convert(image)

    try:
        try:
            return read(path)
        except ValueError as error:
            if "MAX_TEXT" not in str(error):  # Pillow's limits of texts and colour profiles in a PNG, which are no pixels
                raise
            try:
                return read(io.BytesIO(_without_texts(path.read_bytes())))
            except UnidentifiedImageError:
                raise ValueError("it is truncated: its texts are followed by no pixels") from None
    except UnidentifiedImageError:
        reason = f"its format is not one of {', '.join(FORMATS)}"
    except Exception as error:  # Pillow raises errors of any class for damaged bytes
        reason = (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]
    raise UserError(f"{path} is not a readable image: {reason}")


def _without_texts(png: bytes) -> bytes:
    """A PNG file without the chunks of compressed and long texts (ComfyUI's workflows) and of its colour profile."""
    kept, start = [png[:8]], 8
    while start < len(png):
        length, name = int.from_bytes(png[start : start + 4]), png[start + 4 : start + 8]
        end = start + 12 + length  # with the length, the name and the checksum
        if name not in _COMPRESSED and (name != b"tEXt" or length < _SHORT):
            kept.append(png[start:end])
        start = end
    return b"".join(kept)


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
    if frames > 1 and image.format != "MPO":  # a camera's JPEG whose second frame is a preview
        raise ValueError(f"it has {frames} frames, and only single images can be scored")


def _mask(image: Image.Image) -> Image.Image:
    """Convert to grey by the rule of `read_mask`; ValueError if colours and alpha channel both contain a shape."""
    grey = _rgb(image).convert("L")
    if not image.has_transparency_data:
        return grey
    alpha = image.convert("RGBA").getchannel("A")
    least, most = alpha.getextrema()
    if least == most > 0:
        return grey
    opaque = np.asarray(grey)[np.asarray(alpha) == most]
    if int(opaque.max()) - int(opaque.min()) > _ONE_COLOUR:
        raise ValueError("its colours and its alpha channel each contain a shape; save the mask without transparency")
    return alpha


def _rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB; 16-bit grey keeps its high byte, as Pillow does for 16-bit colour (`convert` would clip it at 255)."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers, whose value for white is unknown; save it with 8 or 16 bits")
    return image.convert("RGB")


def is_complete(path: Path) -> bool:
    """Whether `path` exists and can be read to the last pixel."""
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
    """Read images in batches, in order; threads decode the next batch and apply `prepare` to it while the current one is used.

    An unreadable image raises UserError, or, if a list `unreadable` is given, is appended to it and missing from its batch.
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
