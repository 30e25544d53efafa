"""Tiny random pipelines of the real diffusers classes, one for each model family."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)

GOLDEN = Path(__file__).resolve().parent / "golden"
CLIP, OTHER_CLIP, T5 = 32, 48, 96  # widths; T5 is at least as wide as both CLIP encoders together
TIME = 8  # width of each of SDXL's size and crop embeddings
DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

OPEN_CLIP = {  # a CLIP of open_clip, as Q16 reads it
    "model_cfg": {
        "embed_dim": 24, "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]},
}  # fmt: skip


def build(name: str, folder: Path) -> Path:
    """Save the tiny pipeline of a family to a folder; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        FAMILIES[name]().save_pretrained(folder)
    return folder


def sd_v1() -> DiffusionPipeline:
    """Case A's text encoder and 16x16 images."""
    return stable_diffusion(
        CLIPTextModel.from_pretrained(GOLDEN / "A/model/text_encoder"),
        DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **DIFFUSION),
    )


def sd_v2() -> DiffusionPipeline:
    """The text encoder's width is the real 1024; the network predicts the velocity."""
    return stable_diffusion(
        clip(1, width=1024, layers=2, intermediate=32),
        DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction", **DIFFUSION),
    )


def stable_diffusion(text_encoder: CLIPTextModel, scheduler: DDIMScheduler) -> DiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=text_encoder, tokenizer=clip_tokenizer(), unet=unet(text_encoder.config.hidden_size),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl() -> DiffusionPipeline:
    return StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip(1), text_encoder_2=clip(2, width=OTHER_CLIP, projected=True), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), unet=unet(CLIP + OTHER_CLIP, added=OTHER_CLIP + 6 * TIME),
        scheduler=EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading", **DIFFUSION),
    )  # fmt: skip


def sdxl_refiner() -> DiffusionPipeline:
    """It has `sdxl`'s VAE and second text encoder only, and an aesthetic score in place of a target size."""
    return StableDiffusionXLImg2ImgPipeline(
        vae=vae(), text_encoder=None, text_encoder_2=clip(2, width=OTHER_CLIP, projected=True), tokenizer=None,
        tokenizer_2=clip_tokenizer(), unet=unet(OTHER_CLIP, added=OTHER_CLIP + 5 * TIME, seed=5), requires_aesthetics_score=True,
        scheduler=EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading", **DIFFUSION),
        force_zeros_for_empty_prompt=False,
    )  # fmt: skip


def sd_v3() -> DiffusionPipeline:
    torch.manual_seed(6)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=T5, caption_projection_dim=32, pooled_projection_dim=CLIP + OTHER_CLIP, pos_embed_max_size=16,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        vae=vae(channels=16), text_encoder=clip(1, projected=True), tokenizer=clip_tokenizer(),
        text_encoder_2=clip(2, width=OTHER_CLIP, projected=True), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(3), tokenizer_3=t5_tokenizer(), transformer=louder(transformer, {"add_": 3}),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def flux() -> DiffusionPipeline:
    """Its class fixes the default size at 128 latent pixels, so ask for 16x16 images."""
    torch.manual_seed(7)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=T5, pooled_projection_dim=CLIP, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return FluxPipeline(
        vae=vae(channels=16), text_encoder=clip(1), tokenizer=clip_tokenizer(), text_encoder_2=t5(3), tokenizer_2=t5_tokenizer(),
        transformer=louder(transformer, {"context_embedder.": 3, "text_embedder.": 2, "add_": 2, "norm_added_k": 8, "norm_k": 3}),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )  # fmt: skip


def chroma() -> DiffusionPipeline:
    """T5 alone; its class fixes the default size as `flux`'s does."""
    torch.manual_seed(9)
    transformer = ChromaTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=T5, axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=32,
        approximator_layers=1,
    )  # fmt: skip
    return ChromaPipeline(
        vae=vae(channels=16), text_encoder=t5(3), tokenizer=t5_tokenizer(),
        transformer=louder(transformer, {"context_embedder.": 3, "add_": 2, "norm_added_k": 8, "norm_k": 3}),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )  # fmt: skip


def clip(seed: int, width: int = CLIP, layers: int = 3, intermediate: int = 64, projected: bool = False) -> PreTrainedModel:
    """A CLIP text encoder for case A's vocabulary."""
    config = CLIPTextConfig.from_pretrained(
        GOLDEN / "A/model/text_encoder", hidden_size=width, num_hidden_layers=layers, intermediate_size=intermediate,
        projection_dim=width, hidden_act="gelu" if width != CLIP else "quick_gelu",
    )  # fmt: skip
    torch.manual_seed(seed)
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(seed: int) -> T5EncoderModel:
    """A T5 encoder for case C's vocabulary that drops activations when it trains, as the published ones do."""
    config = T5Config.from_pretrained(GOLDEN / "C/model/text_encoder_3", d_model=T5, num_layers=3, dropout_rate=0.1)
    torch.manual_seed(seed)
    return T5EncoderModel(config)


def clip_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(GOLDEN / "A/model/tokenizer")


def t5_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(GOLDEN / "C/model/tokenizer_3")


def unet(width: int, added: int | None = None, seed: int = 4) -> UNet2DConditionModel:
    """A UNet for 16x16 images that reads embeddings of a width, and SDXL's added ones."""
    extra = {"addition_time_embed_dim": TIME, "projection_class_embeddings_input_dim": added}
    torch.manual_seed(seed)
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=width,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **(extra | {"addition_embed_type": "text_time"} if added else {}),
    )  # fmt: skip
    return louder(model, {"attn2.to_": 2}) if added else model


def vae(channels: int = 4) -> AutoencoderKL:
    """A VAE that halves the size; without the layers that the 16-channel ones lack."""
    torch.manual_seed(8)
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels, norm_num_groups=4, sample_size=16,
        **({"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.06} if channels == 16 else {}),
    )  # fmt: skip


def louder(model: nn.Module, factors: dict[str, float]) -> nn.Module:
    """Scale the parameters whose names contain a word, so that the text shows in the image."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for word, factor in factors.items():
                if word in name:
                    parameter.mul_(factor)
    return model


FAMILIES = {each.__name__: each for each in (sd_v1, sd_v2, sdxl, sdxl_refiner, sd_v3, flux, chroma)}
