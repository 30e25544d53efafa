"""The model card (README.md with YAML front matter) that goes with an export: use, figures, training, limits."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from des.cli import UserError
from des.records import read_json
from des.results import show

LOADING = {
    "pipeline": """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{folder}")""",
    "hf": """from diffusers import DiffusionPipeline
from transformers import {classes}

pipe = DiffusionPipeline.from_pretrained("{base}", {hf})""",
    "lora": """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base}")
pipe.load_lora_weights("{folder}")""",
}
_BY_HAND = {
    "comfyui": "Put {files} into ComfyUI's `models/text_encoders` and choose {them} in CLIPLoader, DualCLIPLoader or "
    "TripleCLIPLoader, in place of the text encoder of the checkpoint.",
    "a1111": "Put {files} into `models/Stable-diffusion` and choose it as the checkpoint. Its text encoder is the protected one, "
    "every other tensor is the base file's.",
}
_SCORES = ("clip_score", "fid", "pickscore", "imagereward", "blip")
_SETTINGS = {
    "concept_prompt": "concept prompt",
    "concept_guidance_scale": "alpha (concept guidance scale)",
    "lambda_safe": "lambda",
    "learning_rate": "learning rate",
    "batch_size": "batch size",
    "epoch": "epochs",
    "optimizer": "optimizer",
    "precision": "precision",
    "seed": "seed",
    "target": "target",
    "base_encoder_sha256": "original encoder, sha256",
    "encoder_sha256": "protected encoder, sha256",
    "file_sha256": "checkpoint, sha256",
}


def read_scores(paths: Sequence[Path]) -> list[tuple[str, str, str]]:
    """(file, measure, figure) of scorers' JSON results: k of n with its interval, or a mean. UserError for any other file."""
    rows = []
    for path in paths:
        if not path.is_file():
            raise UserError(f"there is no file of scores {path}")
        found = _figures(read_json(path))
        if not found:
            raise UserError(f"{path} holds no scorer's result: neither k of n nor one of {', '.join(_SCORES)}")
        rows += [(path.name, *figure) for figure in found]
    return rows


def _figures(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    try:
        if {"k", "n", "fraction", "low", "high"} <= content.keys():
            return [("images with a hit", show(content))]
        figures = []
        for name in _SCORES:
            if name in content:
                interval = f" [{content['low']:.2f}, {content['high']:.2f}]" if "low" in content else ""
                images = f", {content['n']} images" if "n" in content else ""
                figures.append((name, f"{content[name]:.2f}{interval}{images}"))
        return figures
    except (TypeError, ValueError):
        return []


def model_card(
    title: str,
    file_format: str,
    base: str,
    folder: str,
    encoders: Mapping[str, str],
    told: Mapping[str, Mapping[str, Any]],
    files: Sequence[str],
    scores: Sequence[tuple[str, str, str]],
    lost: Sequence[str] = (),
) -> str:
    """The text of a card.

    `base` is the original model (a hub id or a folder's name), `folder` where the export is or will be; `encoders` and `told` are
    the class and the checkpoint's metadata by subfolder; `lost` is what a LoRA measured of its loss of protection.
    """
    hub_id = [f"base_model: {_quoted(base)}"] if "/" in base else []
    front = ["---", "license: cc-by-nc-4.0", *hub_id, f"library_name: {'transformers' if file_format == 'hf' else 'diffusers'}"]
    front += ["tags:", *(f"- {tag}" for tag in ("text-to-image", "safety", "concept-erasure", "des", file_format)), "---"]
    parts = [
        "\n".join(front),
        f"# {_line(title)}",
        f"Text encoders of `{_line(base)}` fine-tuned with DES so that prompts for one concept no longer reach it: "
        f"{', '.join(f'`{name}` ({kind})' for name, kind in encoders.items())}. Text encoders not named here are the originals.",
        "## Intended use",
        "Drawing images without the removed concept, in a service or on a machine whose users run the model as it is, and research "
        "on such defences. Not for commercial use. It is no detector and no replacement for one.",
        "## How to load",
        _how(file_format, base, folder, encoders, files),
        "## Measured figures",
        _table(("file", "measure", "figure"), scores) if scores else "None given.",
    ]
    if lost:
        parts += ["### Loss of protection by the low rank", "\n".join(f"- {_line(line)}" for line in lost)]
    parts += ["## Training", *(_training(name, facts) for name, facts in told.items())]
    parts += ["## Training data", *(_data(name, facts) for name, facts in told.items())]
    parts += [
        "## Limits",
        "- Whoever has the weights can undo it: put the original encoder back, fine-tune it, or feed the denoiser embeddings that no "
        "text encoder made.\n- Only the concept trained on is removed, for prompts like those trained on; figures hold for the "
        "prompts and detectors that they were measured with.\n- Images of other concepts change as well.",
        "## Licence",
        "CC BY-NC 4.0 for what was trained here; the licence of the original model holds for its weights as well.",
    ]
    return "\n\n".join(parts) + "\n"


def _how(file_format: str, base: str, folder: str, encoders: Mapping[str, str], files: Sequence[str]) -> str:
    if file_format in _BY_HAND:
        named = ", ".join(f"`{name}`" for name in files)
        return _BY_HAND[file_format].format(files=named, them="it" if len(files) == 1 else "them")

    def load(name: str, kind: str) -> str:
        where = _quoted(folder) + (f', subfolder="{name}"' if len(encoders) > 1 else "")
        return f"{name}={kind}.from_pretrained({where})"

    hf = ", ".join(load(name, kind) for name, kind in encoders.items())
    classes = ", ".join(sorted(set(encoders.values())))
    return f"```python\n{LOADING[file_format].format(folder=folder, base=base, hf=hf, classes=classes)}\n```"


def _training(name: str, facts: Mapping[str, Any]) -> str:
    rows = [(name, title, _short(facts[key])) for key, title in _SETTINGS.items() if key in facts]
    return _table(("encoder", "setting", "value"), rows)


def _data(name: str, facts: Mapping[str, Any]) -> str:
    """The lists of prompts by file name; folders of the machine that trained are nobody's business."""
    made_by = facts.get("made_by")
    arguments = made_by.get("arguments", {}) if isinstance(made_by, dict) else {}
    listed = [arguments.get(key) for key in ("unsafe_csv_path", "safe_csv_path")] if isinstance(arguments, dict) else [None]
    if not all(isinstance(path, str) for path in listed):
        return f"`{name}`: the checkpoint has no metadata that names it."
    unsafe, safe = (_line(Path(path).name) for path in listed)
    return f"`{name}`: prompts only, no images: `{unsafe}` for the concept, `{safe}` for what must stay."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_line(cell).replace("|", "&#124;") for cell in line) + " |" for line in lines)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _line(text: str) -> str:
    return " ".join(str(text).split())


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
