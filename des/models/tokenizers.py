"""Loading the tokenizer of a text encoder, and checking that the two fit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from des.models.families import ENCODER_CLASSES, Family
from des.models.loading import loading
from des.utils.errors import UserError
from des.utils.logs import logger

import transformers
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

NO_LENGTH = 100_000  # transformers gives tokenizers without a maximum length a huge one


def tokenizer_name(encoder: str) -> str:
    """Return the name of a text encoder's tokenizer: `tokenizer_2` for `text_encoder_2`."""
    return encoder.replace("text_encoder", "tokenizer")


def load_tokenizer(
    files: Path,
    model_path: str,
    subfolder: str,
    architecture: str,
    config: PretrainedConfig,
    components: Mapping[str, Any],
    family: Family | None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the text encoder in `subfolder`, whose class and configuration are `architecture` and `config`, from the
    folder `files` of the pipeline `model_path`.

    The tokenizer's class is the one in `components` (see `components_of`), or else in tokenizer_config.json, or else the usual
    one of the encoder. AutoTokenizer would also ask the hub for `tokenizer/config.json`, which no pipeline has and which is therefore
    missing in a complete offline cache.

    If `model_max_length` is missing, or is not a whole number that leaves room for words, it becomes the encoder's number of
    positions, or the length that the `family`'s pipeline gives to T5, which has no positions. If both are unknown, it becomes a huge
    number. Raises UserError if the files cannot be loaded, if a token has no embedding, if most embeddings have no token, and if
    `model_max_length` exceeds the number of positions.
    """
    folder, what = tokenizer_name(subfolder), f"the tokenizer of {subfolder} in {model_path}"
    with loading(what):
        entry = components.get(folder) or [None]
        name = (
            entry[-1]
            or get_tokenizer_config(files, subfolder=folder).get("tokenizer_class")
            or ENCODER_CLASSES[architecture].tokenizer
        )
        # In transformers 4, "CLIPTokenizer" is slow and splits some prompts otherwise than the class of this name in transformers 5.
        tokenizer_class = getattr(transformers, f"{name}Fast", None) or getattr(transformers, name, None)
        if not (isinstance(tokenizer_class, type) and issubclass(tokenizer_class, PreTrainedTokenizerBase)):
            raise ValueError(f"transformers has no tokenizer class {name}")
        names = tokenizer_class.vocab_files_names.values()
        if not any((files / folder / each).is_file() for each in names):  # transformers would make an empty one
            raise ValueError(f"the folder {folder} has none of the files {', '.join(names)}")
        tokenizer = tokenizer_class.from_pretrained(files, subfolder=folder)
    _check_vocabulary(tokenizer, config.vocab_size, what)
    _settle_length(tokenizer, getattr(config, "max_position_embeddings", None), family and family.t5_length, what)
    return tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, embeddings: int, what: str) -> None:
    """Raise UserError if a token has no embedding, or if most embeddings have no token because vocabulary files are missing."""
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > embeddings:
        fix = "use the encoder's original tokenizer, or call `resize_token_embeddings` of the encoder and train the new tokens"
        raise UserError(f"{what} has {tokens} tokens, but the encoder has only {embeddings} embeddings; {fix}")
    if 2 * tokens < embeddings:
        fix = "copy all files of the tokenizer that belongs to the encoder"
        raise UserError(f"{what} has only {tokens} tokens, but the encoder has {embeddings} embeddings; {fix}")


def _settle_length(tokenizer: PreTrainedTokenizerBase, positions: int | None, t5_length: int | None, what: str) -> None:
    """Set a missing or unusable `model_max_length`; UserError if it exceeds the encoder's positions."""
    stated, length = tokenizer.model_max_length, positions or t5_length
    is_usable = type(stated) is int and tokenizer.num_special_tokens_to_add() < stated <= NO_LENGTH
    if is_usable and positions and stated > positions:
        fix = f"set model_max_length to {positions} in tokenizer_config.json, or use the encoder that belongs to the tokenizer"
        raise UserError(f"{what} pads prompts to {stated} tokens, but the encoder has only {positions} positions; {fix}")
    if not is_usable and length:
        origin = "the encoder's number of positions" if positions else "the pipeline's default for T5"
        logger.info("%s has no usable model_max_length (%s); prompts have %d tokens, %s", what, stated, length, origin)
    if not is_usable:
        tokenizer.model_max_length = length or VERY_LARGE_INTEGER
