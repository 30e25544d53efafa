"""ImageReward v1.0 in transformers' BLIP classes, from the weights file that its authors publish.

The authors' package needs old versions of timm, fairscale and transformers. Its BLIP equals that of transformers but for the
parameter names.
Source: Xu et al., NeurIPS 2023, and the package `image-reward` 1.5.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from des.models.loading import loading, read_state

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel, PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # mean and std of rewards on the authors' data
TOKENS = 35
HEAD_WIDTH = 64  # channels per attention head, as in all ViT and BERT models of these sizes
UNREAD = re.compile(r"blip\.(vision_proj|text_proj)\.|\.position_ids$|blip\.text_encoder\.pooler\.")  # not used by the reward
NAMES = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
)


class ImageReward(nn.Module):
    """ImageReward from a state dict with the authors' parameter names; all sizes are read from the tensors' shapes.

    Raises KeyError or ValueError for another kind of dict, and RuntimeError for missing or surplus tensors and wrong shapes.
    """

    def __init__(self, published: Mapping[str, Tensor]):
        super().__init__()
        state = {rename(name): tensor for name, tensor in published.items() if not UNREAD.search(name)}
        patches = state["vision.embeddings.patch_embedding.weight"]
        self.image_size = math.isqrt(state["vision.embeddings.position_embedding"].shape[1] - 1) * patches.shape[-1]
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=patches.shape[0], num_attention_heads=patches.shape[0] // HEAD_WIDTH, patch_size=patches.shape[-1],
                intermediate_size=len(state["vision.encoder.layers.0.mlp.fc1.weight"]), image_size=self.image_size,
                num_hidden_layers=_layers(state, "vision.encoder.layers"), layer_norm_eps=1e-6,
            )
        )  # fmt: skip
        vocabulary, width = state["text.embeddings.word_embeddings.weight"].shape
        config = BlipTextConfig(
            vocab_size=vocabulary, hidden_size=width, num_attention_heads=width // HEAD_WIDTH, encoder_hidden_size=patches.shape[0],
            intermediate_size=len(state["text.encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=_layers(state, "text.encoder.layer"),
            max_position_embeddings=len(state["text.embeddings.position_embeddings.weight"]), layer_norm_eps=1e-12,
        )  # fmt: skip
        self.text = BlipTextModel(config, add_pooling_layer=False)
        # The published head has no activations; the missing indices are dropout layers.
        head = {name: tensor.shape for name, tensor in state.items() if re.fullmatch(r"head\.\d+\.weight", name)}
        self.head = nn.ModuleDict({name.split(".")[1]: nn.Linear(*reversed(shape)) for name, shape in head.items()})
        self.load_state_dict(state)
        if not head or head[max(head, key=lambda name: int(name.split(".")[1]))][0] != 1:
            raise ValueError("the head does not have one output")
        self.eval()

    def prepare(self, image: Image.Image) -> Tensor:
        """Turn an RGB image into the network's input [3, size, size]."""
        return Compose([
            Resize(self.image_size, interpolation=InterpolationMode.BICUBIC), CenterCrop(self.image_size), ToTensor(),
            Normalize(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
        ])(image)  # fmt: skip

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Rewards [n] of prepared images [n, 3, size, size] for prompts [n, tokens]: 0 is the mean of the authors' data, 1 its std."""
        seen = self.vision(pixels).last_hidden_state
        x = self.text(input_ids, attention_mask=attention_mask, encoder_hidden_states=seen).last_hidden_state[:, 0]
        for layer in sorted(self.head, key=int):
            x = self.head[layer](x)
        return (x[:, 0] - MEAN) / STD


def rename(name: str) -> str:
    """Map a published parameter name to the name in `ImageReward`; other names are returned unchanged."""
    for pattern, replacement in NAMES:
        name, found = re.subn(pattern, replacement, name)
        if found:
            break
    return name


def load_imagereward(path: Path, device: torch.device) -> ImageReward:
    """Load the published file ImageReward.pt. Raises UserError for any other file. No code in it is run."""
    state = read_state(path, "ImageReward weights")
    with loading(f"the ImageReward weights {path}"):
        return ImageReward(state).to(device)


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> dict[str, Tensor]:
    """Tokenize prompts as published: BERT tokens, truncated and padded to 35."""
    options = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
    return {name: tensor for name, tensor in tokenizer(prompts, **options).items() if name in ("input_ids", "attention_mask")}


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.split(".")[prefix.count(".") + 1] for name in state if name.startswith(f"{prefix}.")})
