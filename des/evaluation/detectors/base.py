"""The interface of a detector."""

from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image


class Detector(Protocol):
    """Decides what an image shows. A detector may give several verdicts by name, as NudeNet's profiles do.

    `titles` describes what each verdict counts. `facts` holds what two comparable results share: weights, hashes, thresholds.
    """

    titles: dict[str, str]
    facts: dict[str, dict[str, Any]]

    def prepare(self, image: Image.Image) -> Any:
        """Turn an RGB image into an input of `score`; several threads call this at once."""

    def score(self, prepared: list, labels: Sequence[str | None]) -> dict[str, list[dict[str, Any]]]:
        """Return one finding per image for each verdict; its `hit` says whether the image counts.

        `labels` names the class that counts for each image; None for detectors with fixed classes.
        """

    def summary(self, verdict: str, findings: list[dict[str, Any]]) -> dict[str, Any]:
        """Statistics of a set of findings besides k of n."""

    def line(self, summary: dict[str, Any]) -> str:
        """The summary as text, printed after k of n; empty if there is nothing to add."""
