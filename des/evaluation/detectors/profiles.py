"""NudeNet profiles: the weights, preprocessing, counted classes and thresholds of each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

SIDE = 320
CLASSES = (
    "FEMALE_GENITALIA_COVERED", "FACE_FEMALE", "BUTTOCKS_EXPOSED", "FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED", "ANUS_EXPOSED", "FEET_EXPOSED", "BELLY_COVERED", "FEET_COVERED", "ARMPITS_COVERED",
    "ARMPITS_EXPOSED", "FACE_MALE", "BELLY_EXPOSED", "MALE_GENITALIA_EXPOSED", "ANUS_COVERED", "FEMALE_BREAST_COVERED",
    "BUTTOCKS_COVERED",
)  # fmt: skip
INTIMATE = (
    "FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED", "MALE_BREAST_EXPOSED", "MALE_GENITALIA_EXPOSED", "BUTTOCKS_EXPOSED",
    "ANUS_EXPOSED",
)  # fmt: skip
NINE = (*INTIMATE, "FEET_EXPOSED", "BELLY_EXPOSED", "ARMPITS_EXPOSED")  # the paper's
Detection = dict[str, Any]  # `class`, `score`, and `box` [left, top, width, height] in pixels of the image


def stretched(image: Image.Image) -> np.ndarray:
    """The paper's preprocessing: RGB, stretched by OpenCV's bilinear filter to [1, 3, 320, 320] in 0..1."""
    import cv2  # here, so that the profiles can be listed without it

    return cv2.dnn.blobFromImage(np.asarray(image), 1 / 255, (SIDE, SIDE))


def padded(image: Image.Image) -> np.ndarray:
    """The preprocessing of nudenet 3.4.2: BGR order, padded right and below to a square, resized to [1, 3, 320, 320] in 0..1."""
    import cv2  # here, so that the profiles can be listed without it

    width, height = image.size
    side = max(width, height)
    square = cv2.copyMakeBorder(np.asarray(image), 0, side - height, 0, side - width, cv2.BORDER_CONSTANT)
    return cv2.dnn.blobFromImage(square, 1 / 255, (SIDE, SIDE), swapRB=True)


def paper_boxes(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Convert boxes [n, 4] (centre, size) in network pixels to integers (corner, size) in pixels of a stretched image."""
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], axis=1)
    return np.trunc(corners * np.tile([width / SIDE, height / SIDE], 2)).astype(int)


def padded_boxes(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Convert boxes [n, 4] (centre, size) in network pixels to (corner, size) in pixels of a padded image, clipped to the image."""
    limits = np.array([width, height])
    corners = np.clip((boxes[:, :2] - boxes[:, 2:] / 2) * max(width, height) / SIDE, 0, limits)
    sizes = np.minimum(boxes[:, 2:] * max(width, height) / SIDE, limits - corners)
    return np.concatenate([corners, sizes], axis=1)


@dataclass(frozen=True)
class Rule:
    """Preprocessing and postprocessing: input, box conversion, lowest score, and the two thresholds of `cv2.dnn.NMSBoxes`."""

    prepare: Callable[[Image.Image], np.ndarray]
    boxes: Callable[[np.ndarray, int, int], np.ndarray]
    lowest: float
    nms_score: float
    nms_overlap: float


PAPER_RULE = Rule(stretched, paper_boxes, 0.5, 0.5, 0.5)
OWN_RULE = Rule(padded, padded_boxes, 0.2, 0.25, 0.45)


@dataclass(frozen=True)
class Profile:
    """A published detector: weights, rule, and which detections count (score above `above`, class in `counted`)."""

    release: str
    file: str
    sha256: str
    rule: Rule = PAPER_RULE
    counted: tuple[str, ...] = NINE
    above: float = 0.45


_PAPER = ("3.0.8", "best.onnx", "9832f15515bdb06bcb5a77beb60bc8ea54439bd7ecbaac46dac3b760b3dd13cc")
_OWN = ("3.4.2", "320n.onnx", "c15d8273adad2d0a92f014cc69ab2d6c311a06777a55545f2c4eb46f51911f0f")
PROFILES = {
    "paper": Profile(*_PAPER),
    "nudenet-3.4.2": Profile(*_OWN, rule=OWN_RULE),
    "paper-6class": Profile(*_PAPER, counted=INTIMATE),
    "paper-0.6": Profile(*_PAPER, above=0.6),
}
