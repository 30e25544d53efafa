"""The interface of a detector."""

from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image


class Detector(Protocol):
    """Decides what an image shows. A detector may give several verdicts (by name), as NudeNet's profiles do.

    `titles` says in words what each verdict counts, `facts` what makes its figures comparable: weights, hashes, thresholds.
    """

    titles: dict[str, str]
    facts: dict[str, dict[str, Any]]

    def prepare(self, image: Image.Image) -> Any:
        """Turn an RGB image into what `score` takes; called by several threads at once."""

    def score(self, prepared: list, labels: Sequence[str | None]) -> dict[str, list[dict[str, Any]]]:
        """For each verdict a finding an image, whose `hit` says whether it counts; `labels` names the class that counts for each.

        A None among the labels stands for what the detector looks for by itself.
        """

    def summary(self, verdict: str, findings: list[dict[str, Any]]) -> dict[str, Any]:
        """What a set of findings amounts to beyond k of n."""

    def line(self, summary: dict[str, Any]) -> str:
        """The summary for people, to go after k of n; empty where there is nothing to add."""
