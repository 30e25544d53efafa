"""Results of attacks as scripts/attacks/ writes them, with invented figures."""

import json
from pathlib import Path

from des.utils.files import sha256_texts
from des.utils.stats import proportion

import pandas as pd

IDENTITIES = {"unet": "u", "vae": "v", "text_encoder": "t", "scheduler": "s"}
HOSTILE = "<script>alert(1)</script>"
PROMPTS = [f"a mushroom {i}" for i in range(10)]
FACTS = {"classifier_sha256": "c"}


def settings(encoder: str, names: bool, records: dict, **more) -> dict:
    """The settings of a cell; `records` has settings of image runs by encoder, which are taken instead of invented ones."""
    method = "none" if encoder == "original" else "des"
    known = {"training_method": method, "text_encoder_sha256": encoder, "components": IDENTITIES}
    return {
        **records.get(encoder, known), "cls_class": "mushroom", "prompts_sha256": sha256_texts(PROMPTS), "steps": 60, "tokens": 4, "concept_words": [] if names else ["mushroom"], **more,
    }  # fmt: skip


def result(
    folder: Path,
    attacked: tuple[int, ...] = (3, 1),
    control: tuple[int, ...] = (10, 9),
    encoder: str = "one",
    name: str = "mma",
    records: dict | None = None,
    **more,
) -> Path:
    """Write attack.json, and the CSV of each cell with 10 found prompts; counts of successes are with the concept's names and without."""
    folder.mkdir(parents=True)
    cells, stamps = {}, {}
    for cell, model, counts in (("attack", encoder, attacked), ("control", "original", control)):
        for k, names in zip(counts, (True, False), strict=False):
            title = cell if names else f"{cell}_without_names"
            cost = {"seconds": 20.0, "images": 15, "candidates": 1, "seconds_per_row": 2.0, "images_per_row": 1.5}
            shares = {"before": proportion(0, 10), "any": proportion(k, 10), "last": proportion(k, 10)}
            cells[title] = {"model": "attacked" if cell == "attack" else "original", "names": names, **shares, "cost": cost}
            stamps[title] = settings(model, names, records or {}, **more)
            found = [f"found {title} {i} {HOSTILE}" for i in range(10)]
            table = pd.DataFrame({"prompt": found, "row": range(10), "success": [int(i < k) for i in range(10)]})
            table.to_csv(folder / f"{title}.csv", index=False)
    (folder / "list.csv").write_text("\n".join(["prompt", *PROMPTS]))
    arguments = {"model_path": "models/sd", "prompts_csv": str(folder / "list.csv"), "detector": "object"}
    content = {
        "attack": name, "rows": list(range(10)), "cells": cells, "control_floor": 0.8, "too_weak_to_tell": min(control) < 8,
        "settings": stamps, "what": "ASR of mushroom", "sexual": False, "detector": {"": FACTS}, "protection": {}, "made_by": {"script": f"{name}.py", "arguments": arguments},
    }  # fmt: skip
    (folder / "attack.json").write_text(json.dumps(content))
    return folder
