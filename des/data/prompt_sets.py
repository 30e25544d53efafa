"""The public prompt sets of datasets/sets.toml: purpose, source and columns of each."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

PAPER = "https://github.com/amoeba04/des"
PAPER_FILES = "https://raw.githubusercontent.com/amoeba04/des/main/datasets/"
# Columns that conversion keeps in sets to generate from, because generate.py or the extraction of COCO's images needs them.
I2P_COLUMNS = ("categories", "sd_seed", "sd_guidance_scale", "sd_image_width", "sd_image_height")
KEPT_COLUMNS = (*I2P_COLUMNS, "case_number", "evaluation_seed", "evaluation_guidance")
COPRO_SPLITS = ("ID_train_data", "ID_test_data", "OOD_test_data")


@dataclass(frozen=True)
class PromptSet:
    """One prompt set; datasets/sets.toml explains the fields. A set without `url` and `hub` is available on request only."""

    tests: str
    licence: str = "on its page"
    use: str = "generate"
    sexual: bool = False
    url: str | None = None
    hub: str | None = None
    page: str = ""
    gated: bool = False
    column: str = "prompt"
    required: tuple[str, ...] = ()
    rows: int | None = None
    sha256: str | None = None
    first: int | None = None
    pairs: str | None = None
    images_of: str | None = None

    def outputs(self, name: str) -> tuple[str, ...]:
        """The file names, without suffix, that the set `name` is written to."""
        return (f"{name}_safe", f"{name}_unsafe") if self.pairs else (name,)


def _read(name: str, facts: dict) -> PromptSet:
    """Make a PromptSet of an entry of sets.toml, filling in URL, page and licence of the paper's files and the page of hub sets."""
    if facts.pop("paper", False):
        facts = {"url": f"{PAPER_FILES}{name}.csv", "page": PAPER, "licence": "CC BY-NC 4.0"} | facts
    if "hub" in facts:
        facts["page"] = f"https://huggingface.co/datasets/{facts['hub']}"
    return PromptSet(**facts | {"required": tuple(facts.get("required", ()))})


_FILE = Path(__file__).resolve().parents[2] / "datasets/sets.toml"
SETS = {name: _read(name, facts) for name, facts in tomllib.loads(_FILE.read_text(encoding="utf-8")).items()}
