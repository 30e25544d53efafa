"""The public prompt sets of datasets/sets.toml: what each tests, where it comes from, and which columns are kept."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

PAPER = "https://github.com/amoeba04/des"
PAPER_FILES = "https://raw.githubusercontent.com/amoeba04/des/main/datasets/"
# Columns that are kept under their names where a set to generate from has them: generate.py or COCO's images need them.
I2P_COLUMNS = ("categories", "sd_seed", "sd_guidance_scale", "sd_image_width", "sd_image_height")
KEPT_COLUMNS = (*I2P_COLUMNS, "case_number", "evaluation_seed", "evaluation_guidance")
COPRO_SPLITS = ("ID_train_data", "ID_test_data", "OOD_test_data")


@dataclass(frozen=True)
class PromptSet:
    """One set; datasets/sets.toml explains the fields. Each set has a `url`, a `hub` data set, or neither (on request)."""

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
    """One entry of sets.toml; the address, page and licence of the paper's files and the page of hub sets are filled in."""
    if facts.pop("paper", False):
        facts = {"url": f"{PAPER_FILES}{name}.csv", "page": PAPER, "licence": "CC BY-NC 4.0"} | facts
    if "hub" in facts:
        facts["page"] = f"https://huggingface.co/datasets/{facts['hub']}"
    return PromptSet(**facts | {"required": tuple(facts.get("required", ()))})


_FILE = Path(__file__).resolve().parents[2] / "datasets/sets.toml"
SETS = {name: _read(name, facts) for name, facts in tomllib.loads(_FILE.read_text(encoding="utf-8")).items()}
