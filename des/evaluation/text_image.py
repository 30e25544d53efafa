"""Scores of how well an image matches its prompt: PickScore, BLIP score and ImageReward. Each job is one function.

All take the images that `pair_with_prompts` returns and the folders or hub ids of the models (by the names of
`choices.SCORER_MODELS`), and return the columns of the per-image table, the score first, and the hashes of the models.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from des.evaluation.imagereward import load_imagereward, tokenize
from des.evaluation.scored_images import Scoring, clip_cosine, load_processor, score_images
from des.evaluation.scorer_identity import MODEL, PROCESSOR, TOKENIZER, configuration_sha256
from des.models.checkpoints import fingerprint
from des.models.loading import features, load_model, loading
from des.utils.errors import UserError
from des.utils.files import sha256_texts

import pandas as pd
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity
from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipProcessor, CLIPModel, CLIPProcessor

TITLES = {"pickscore": "PickScore", "blipscore": "BLIP score", "imagereward": "ImageReward"}
REWARD_FILE = "ImageReward.pt"
CAPTION = {"max_length": 50, "num_beams": 1, "do_sample": False}  # max_length as published; it includes the first token
Scored = tuple[dict[str, list], dict[str, Any]]


def pickscore(images: pd.DataFrame, sources: Mapping[str, str], device: torch.device, how: Scoring) -> Scored:
    """PickScore: exp(logit scale) * cosine(image, prompt), about 15 to 25. Source: Kirstain et al., NeurIPS 2023."""
    processor = load_processor(CLIPProcessor, sources["processor"])
    model = load_model(CLIPModel, sources["model"], device, "the PickScore model")
    hashes = {
        "model_sha256": fingerprint(model),
        "model_configuration_sha256": configuration_sha256(sources["model"], MODEL),
        "processor_sha256": configuration_sha256(sources["processor"], PROCESSOR + TOKENIZER),
    }
    scale = model.logit_scale.detach().exp().item()
    scores = score_images(images, how, hashes, clip_cosine(model, processor))
    return {"pickscore": [scale * cosine for cosine in scores]}, hashes


def blipscore(images: pd.DataFrame, sources: Mapping[str, str], device: torch.device, how: Scoring) -> Scored:
    """BLIP score: the cosine in -1..1 between CLIP's text features of the prompt and of BLIP's caption (greedy, 50 tokens)."""
    processor = load_processor(BlipProcessor, sources["model"])
    captioner = load_model(BlipForConditionalGeneration, sources["model"], device, "the captioner")
    tokenizer = load_processor(AutoTokenizer, sources["clip_model"])
    clip = load_model(CLIPModel, sources["clip_model"], device, "the CLIP model")
    hashes = {
        "model_sha256": fingerprint(captioner),
        "model_configuration_sha256": configuration_sha256(sources["model"], MODEL + PROCESSOR + TOKENIZER),
        "clip_sha256": fingerprint(clip),
        "clip_configuration_sha256": configuration_sha256(sources["clip_model"], MODEL + TOKENIZER),
        "caption_settings_sha256": sha256_texts([json.dumps(CAPTION, sort_keys=True)]),
    }

    def score(batch: list[Image.Image], prompts: list[str]) -> list[tuple[float, str]]:
        pixels = processor(images=batch, return_tensors="pt")["pixel_values"].to(device)
        tokens = captioner.generate(pixel_values=pixels, **CAPTION)
        captions = [caption.strip() for caption in processor.batch_decode(tokens, skip_special_tokens=True)]
        of_prompts, of_captions = (_text_features(clip, tokenizer, texts) for texts in (prompts, captions))
        return list(zip(cosine_similarity(of_prompts, of_captions).tolist(), captions, strict=True))

    scores, captions = zip(*score_images(images, how, hashes, score), strict=True)
    return {"blipscore": list(scores), "caption": list(captions)}, hashes | {"caption_settings": CAPTION}


def _text_features(clip: CLIPModel, tokenizer: AutoTokenizer, texts: list[str]) -> torch.Tensor:
    length = clip.config.text_config.max_position_embeddings
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt").to(clip.device)
    return features(clip.get_text_features(**inputs)).cpu().double()


def imagereward(images: pd.DataFrame, sources: Mapping[str, str], device: torch.device, how: Scoring) -> Scored:
    """ImageReward v1.0, normalised as published, about -2 to 2. Source: Xu et al., NeurIPS 2023."""
    tokenizer = load_processor(AutoTokenizer, sources["processor"])
    model = load_imagereward(_reward_file(sources["model"]), device)
    if len(tokenizer) > model.text.config.vocab_size:
        raise UserError(
            f"{sources['processor']} has {len(tokenizer)} tokens, but {sources['model']} knows {model.text.config.vocab_size}; "
            "give the matching tokenizer with --processor"
        )
    hashes = {"model_sha256": fingerprint(model), "processor_sha256": configuration_sha256(sources["processor"], TOKENIZER)}

    def score(batch: list[torch.Tensor], prompts: list[str]) -> list[float]:
        inputs = {name: tensor.to(device) for name, tensor in tokenize(tokenizer, prompts).items()}
        return model(torch.stack(batch).to(device), **inputs).tolist()

    return {"imagereward": score_images(images, how, hashes, score, model.prepare)}, hashes


def _reward_file(source: str) -> Path:
    """The path of the weights file, given as a file, its folder or a hub id (then it is downloaded)."""
    path = Path(source)
    if path.is_dir():
        path /= REWARD_FILE
    if path.is_file():
        return path
    from huggingface_hub import hf_hub_download

    with loading(f"{REWARD_FILE} of {source}", source):
        return Path(hf_hub_download(source, REWARD_FILE))


JOBS = {"pickscore": pickscore, "blipscore": blipscore, "imagereward": imagereward}
