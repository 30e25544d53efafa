"""The model card of an export (README.md with YAML front matter): use, figures, training and limits."""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from des.data.run_record import read_json
from des.export.card_scores import HEAD
from des.models.shift import UNMEASURED, is_unmeasured

import torch
from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

LOADING = {  # the values are Python literals
    "pipeline": """import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({folder}, {absent}dtype={dtype})""",
    "hf": """import torch
from diffusers import DiffusionPipeline
from transformers import {classes}

# The text encoder and the rest of the pipeline need one dtype.
pipe = DiffusionPipeline.from_pretrained({base}, {hf}, {absent}dtype={dtype})""",
    "lora": """import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({base}, {absent}dtype={dtype})
pipe.load_lora_weights({folder})
# A LoRA that is only loaded is an adapter, and loading or choosing another one for the text encoder switches it off: the original
# model would draw. Fusing writes it into the weights, and unloading removes the adapter, so that nothing can take it out again.
pipe.fuse_lora(components={components})
pipe.unload_lora_weights()""",
}
_UNNAMED = "HUB_ID_OR_FOLDER_OF_THE_ORIGINAL_MODEL"  # in Python blocks, where the original model's hub id is unknown
_BY_HAND = {
    "comfyui": "Put {files} into ComfyUI's `models/text_encoders` and choose {them} in CLIPLoader, DualCLIPLoader or "
    "TripleCLIPLoader, in place of the text encoder of the checkpoint. ComfyUI runs encoders of the sizes of CLIP-L, CLIP-bigG and "
    "T5-XXL only.",
    "a1111": "Put {files} into `models/Stable-diffusion` and choose it as the checkpoint. Its text encoder is the protected one, "
    "every other tensor is the base file's.",
}
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


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a model's hub id, OWNER/NAME."""
    with contextlib.suppress(HFValidationError):
        validate_repo_id(text)
        return "/" in text
    return False


def hub_id_of(model_path: str) -> str | None:
    """Return the hub id of a model: `model_path` itself, or that of a folder in the hub's cache or named in its model_index.json."""
    folder = Path(model_path)
    if not folder.is_dir():
        return model_path
    cached = re.search(r"/models--([^/]+)--([^/]+)/snapshots/", f"{folder.resolve()}/")
    if cached:
        return "/".join(cached.groups())
    index = folder / "model_index.json"
    named = read_json(index).get("_name_or_path") if index.is_file() else None
    return named if isinstance(named, str) and is_hub_id(named) and not Path(named).exists() else None


def model_card(
    title: str,
    file_format: str,
    base: str | None,
    folder: str,
    dtype: torch.dtype,
    encoders: Mapping[str, str],
    metadata: Mapping[str, Mapping[str, Any]],
    files: Sequence[str],
    scores: Sequence[Sequence[str]],
    lost: Sequence[str] = (),
    absent: Sequence[str] = (),
) -> str:
    """Return the text of a card.

    `base` is the original model's hub id, None if it is unknown, `folder` the path or hub id of the export, `dtype` the one to load
    it in; `encoders` and `metadata` are the class and the checkpoint's metadata by subfolder; `scores` are rows under
    `des.export.card_scores.HEAD`; `lost` describes the LoRA's loss of protection; `absent` names the text encoders and
    tokenizers that are missing from the pipeline. All names are escaped for YAML, Markdown and Python.
    """
    parts = [
        f"---\n{_front(file_format, base)}\n---",
        f"# {_text(title)}",
        f"Text encoders of {_code(base) if base else 'a model'} {_aim(metadata, lost)}: "
        f"{', '.join(f'{_code(name)} ({kind})' for name, kind in encoders.items())}. Text encoders not named here are the originals.",
        *(
            f"**Warning:** {_code(name)} may not protect. {_text(facts['doubt'])}."
            for name, facts in metadata.items()
            if facts.get("doubt")
        ),
        *(f"**Not measured:** {_code(name)}: {UNMEASURED}." for name, facts in metadata.items() if is_unmeasured(facts)),
        "## Intended use",
        "Drawing images without the removed concept, in a service or on a machine whose users run the model as it is, and research "
        "on such defences. Not for commercial use. It does not replace a detector.",
        "## How to load",
        _how(file_format, base, folder, dtype, encoders, files, absent),
        "## Measured figures",
        _table(HEAD, scores) if scores else "None given.",
    ]
    if lost:
        parts += ["### Loss of protection by the low rank", "\n".join(f"- {_text(line)}" for line in lost)]
    parts += ["## Training", *(_training(name, facts) for name, facts in metadata.items())]
    parts += ["## Training data", *(_data(name, facts) for name, facts in metadata.items())]
    parts += [
        "## Limits",
        "- Anyone with the weights can undo the protection: by restoring or fine-tuning the encoder, or by feeding the denoiser "
        "embeddings that no text encoder produces.\n- Only the concept in training is removed, for prompts like those in training; "
        "figures hold for the prompts and detectors used to measure them.\n- Images of other concepts change as well.",
        "## Licence",
        "CC BY-NC 4.0 for the trained weights; the licence of the original model also applies.",
    ]
    return "\n\n".join(parts) + "\n"


def _aim(metadata: Mapping[str, Mapping[str, Any]], lost: Sequence[str]) -> str:
    """What DES did to the encoders; as an aim only, if one of them may not protect, was not measured, or lost protection as a LoRA."""
    if lost or any(facts.get("doubt") or is_unmeasured(facts) for facts in metadata.values()):
        return "fine-tuned with DES, whose aim is that prompts for one concept no longer reach the model"
    return "fine-tuned with DES so that prompts for one concept no longer reach it"


def _front(file_format: str, base: str | None) -> str:
    data = ModelCardData(
        license="cc-by-nc-4.0",
        library_name="transformers" if file_format == "hf" else "diffusers",
        pipeline_tag="text-to-image",
        tags=["safety", "concept-erasure", "des", file_format],
        base_model=base,
    )
    return data.to_yaml().strip()


def _how(
    file_format: str,
    base: str | None,
    folder: str,
    dtype: torch.dtype,
    encoders: Mapping[str, str],
    files: Sequence[str],
    absent: Sequence[str],
) -> str:
    if file_format in _BY_HAND:
        named = ", ".join(map(_code, files))
        return _BY_HAND[file_format].format(files=named, them="it" if len(files) == 1 else "them")

    def load(name: str, kind: str) -> str:
        where = _python(folder) + (f", subfolder={_python(name)}" if len(encoders) > 1 else "")
        return f"{name}={kind}.from_pretrained({where}, dtype={dtype})"

    values = {
        "folder": _python(folder),
        "base": _python(base or _UNNAMED),
        "dtype": dtype,
        "classes": ", ".join(sorted(set(encoders.values()))),
        "hf": ", ".join(load(name, kind) for name, kind in encoders.items()),
        "absent": "".join(f"{name}=None, " for name in absent),
        "components": f"[{', '.join(map(_python, encoders))}]",
    }
    older = "diffusers before 0.40 and transformers before 4.56 silently ignore `dtype`; write `torch_dtype` for them."
    return f"```python\n{LOADING[file_format].format(**values)}\n```\n\n{older}"


def _training(name: str, facts: Mapping[str, Any]) -> str:
    rows = [(name, title, _short(facts[key])) for key, title in _SETTINGS.items() if key in facts]
    return _table(("encoder", "setting", "value"), rows)


def _data(name: str, facts: Mapping[str, Any]) -> str:
    """Describe the lists of prompts by file name, without the private paths of the machine used for training."""
    made_by = facts.get("made_by")
    arguments = made_by.get("arguments", {}) if isinstance(made_by, dict) else {}
    listed = [arguments.get(key) for key in ("unsafe_csv_path", "safe_csv_path")] if isinstance(arguments, dict) else [None]
    if not all(isinstance(path, str) for path in listed):
        return f"{_code(name)}: the checkpoint's metadata does not name its training data."
    unsafe, safe = (_code(Path(path).name) for path in listed)
    return f"{_code(name)}: prompts only, no images: {unsafe} for the concept, {safe} for prompts to preserve."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _line(text: str) -> str:
    return " ".join(str(text).split())


def _text(text: str) -> str:
    """Escape a name or value as plain text in Markdown: no markup, HTML, link or cell border."""
    link, emphasis = r"\](?=[(\[:])", r"(?<![^\W_])_|_(?![^\W_])"  # not within a word
    return re.sub(rf"[\\`*<>&|~$#]|{link}|{emphasis}", r"\\\g<0>", _line(text))


def _code(text: str) -> str:
    """Format a name as code in Markdown, even if it contains backticks."""
    line = _line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if "`" in line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _python(text: str) -> str:
    """Return a string as a Python literal on one line."""
    return json.dumps(text, ensure_ascii=False)
