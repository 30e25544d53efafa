"""Hashes of what determines a score besides the weights: the configuration of a model, its processor and its tokenizer.

The same weights give other verdicts with another `preprocessor_config.json` or other label names. The files are hashed, not
the objects that a library builds from them, so that a library update changes no hash.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from des.utils.errors import UserError
from des.utils.files import sha256_texts

from huggingface_hub import try_to_load_from_cache

MODEL = ("config.json", "generation_config.json", "open_clip_config.json")
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
NO_IDENTITY = ("classifier", "weights", "provider", "onnxruntime", "opencv", "open_clip")
"""Facts of a detector that are recorded but not part of its identity: file locations and library versions."""
_NO_CONFIGURATION = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "dtype", "torch_dtype")


def detector_identity(facts: Mapping[str, Any]) -> str:
    """The sha256 of a detector's facts without NO_IDENTITY. Results are compared, and verdicts reused, only if it is equal."""
    kept = {name: value for name, value in facts.items() if name not in NO_IDENTITY}
    return sha256_texts([json.dumps(kept, sort_keys=True, default=str)])


def configuration_sha256(source: str, names: tuple[str, ...]) -> str:
    """The sha256 of the files `names`, as far as a loaded model's folder or hub id has them.

    Entries about the storage location, library version and dtype on disk are left out. Raises UserError if it has none of the files.
    """
    found = {name: path for name in names if (path := _file_of(source, name)) is not None}
    if not found:
        raise UserError(f"{source} has none of the files {', '.join(names)}, by which its scores are identified; add them")
    return sha256_texts(text for name, path in found.items() for text in (name, _content(path)))


def _file_of(source: str, name: str) -> Path | None:
    if Path(source).is_dir():
        path: Any = Path(source) / name
        return path if path.is_file() else None
    path = try_to_load_from_cache(source, name)
    return Path(path) if isinstance(path, str) else None


def _content(path: Path) -> str:
    data = path.read_bytes()
    try:
        return json.dumps(_configuration(json.loads(data)), sort_keys=True)
    except ValueError:
        return data.hex()


def _configuration(value: Any) -> Any:
    """JSON without the entries that change no score."""
    if isinstance(value, dict):
        return {name: _configuration(each) for name, each in value.items() if name not in _NO_CONFIGURATION}
    return [_configuration(each) for each in value] if isinstance(value, list) else value
