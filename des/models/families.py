"""The table of model families, which holds everything that differs between them. A new family is one entry here.

Classes are named by strings, so that options can be parsed before torch and diffusers are imported.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # torch's names by those of options
EMBEDDINGS = ("last_hidden_state", "pipeline")
DIFFUSION = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
FLOW = {"flow_euler": "FlowMatchEulerDiscreteScheduler", "flow_heun": "FlowMatchHeunDiscreteScheduler"}
SCHEDULERS = (*DIFFUSION, *FLOW)
MODES = ("text", "image", "inpaint")  # inputs of a pipeline: a prompt, with an image, with an image and a mask
REFINER_CLASS = "StableDiffusionXLImg2ImgPipeline"
COMFYUI = {  # what ComfyUI's loader builds for each of its names, whatever the file's sizes: entries of the encoder's config.json
    "clip_l": {
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
    },
    "clip_g": {
        "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
        "hidden_act": "gelu",
    },
    "t5xxl": {
        "vocab_size": 32128, "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """Which output of an encoder is the embedding, [batch, rows, hidden], and how the encoder is called."""

    states: str  # "last": after the final layer norm; "penultimate": before the last layer; "pooled": one row
    attention_mask: bool = False  # whether padding is masked
    length: int | None = None  # tokens to pad to; None for the tokenizer's `model_max_length`


LAST, PENULTIMATE, POOLED = Reading("last"), Reading("penultimate"), Reading("pooled")


@dataclass(frozen=True)
class EncoderClass:
    """A class of text encoder: how the paper reads its last hidden state, its dtype, and whether prompts may have any length."""

    last_hidden_state: Reading
    tokenizer: str = "CLIPTokenizer"  # the usual class of its tokenizer, for folders that name none
    dtype: str = "fp32"
    any_length: bool = False


ENCODER_CLASSES = {  # by the class in `text_encoder*/config.json`
    "CLIPTextModel": EncoderClass(LAST),
    "CLIPTextModelWithProjection": EncoderClass(LAST),
    "T5EncoderModel": EncoderClass(Reading("last", attention_mask=True), "T5TokenizerFast", "bf16", any_length=True),
}


@dataclass(frozen=True)
class Encoder:
    """A text encoder of a family: how the pipeline reads it, and the name of its file in ComfyUI (a key of COMFYUI)."""

    reading: Reading
    comfyui: str | None = None


@dataclass(frozen=True)
class Family:
    """A model family: how its pipelines are opened, how their text encoders are read, and the defaults for drawing."""

    name: str  # a value of --model_type
    pipeline: str  # the class in model_index.json
    encoders: dict[int, Encoder]  # by 1-based index
    dtype: str
    # The component, entry of its config.json and values (None: no entry) that distinguish a family from the first one of its class.
    distinguished_by: tuple[str, str, tuple] | None = None
    model_type: str | None = None  # another value of --model_type that includes this family
    reads_use_attention_mask: bool = False  # whether the pipeline masks padding if the encoder's config.json says so
    num_inference_steps: int = 50
    guidance_scale: float = 7.5  # 0 for models that were distilled without guidance and ignore it
    max_sequence_length: int | None = None  # tokens of a T5 prompt; None for the default of the pipeline's class
    negative_prompt: bool = True
    schedulers: dict[str, str] = field(default_factory=lambda: DIFFUSION)  # diffusers' class by the option's name
    scheduler: str | None = None  # the default; None for the scheduler in the model's files
    modes: tuple[str, ...] = MODES
    optional_encoders: tuple[int, ...] = ()  # text encoders without which the pipeline draws, too (their embeddings are zeros)
    exports: tuple[str, ...] = ()  # formats besides `pipeline`, `hf` and, if the encoders have ComfyUI names, `comfyui`
    options: dict[str, Any] = field(default_factory=dict)  # for `from_pretrained`

    @property
    def t5_length(self) -> int | None:
        """Tokens that the pipeline gives to T5; None for families without T5."""
        return next((encoder.reading.length for encoder in self.encoders.values() if encoder.reading.length), None)


# Of several families with one pipeline class, the first is the default.
_STABLE_DIFFUSION = {
    "pipeline": "StableDiffusionPipeline",
    "dtype": "fp32",
    "reads_use_attention_mask": True,
    "options": {"safety_checker": None, "requires_safety_checker": False},
}
_FLUX = Family(
    "flux",
    "FluxPipeline",
    {1: Encoder(POOLED, "clip_l"), 2: Encoder(Reading("last", length=512), "t5xxl")},
    "bf16",
    guidance_scale=3.5,
    negative_prompt=False,
    schedulers=FLOW,
)
_FAMILIES = (
    Family("sd_v1", encoders={1: Encoder(LAST, "clip_l")}, scheduler="ddim", exports=("a1111", "lora"), **_STABLE_DIFFUSION),
    Family(
        "sd_v2",
        encoders={1: Encoder(LAST)},
        distinguished_by=("text_encoder", "hidden_size", (1024,)),
        scheduler="euler",
        exports=("lora",),
        **_STABLE_DIFFUSION,
    ),
    Family(
        "sdxl",
        "StableDiffusionXLPipeline",
        {1: Encoder(PENULTIMATE, "clip_l"), 2: Encoder(PENULTIMATE, "clip_g")},
        "fp16",
        exports=("lora",),
        options={"add_watermarker": False},
    ),
    Family(
        "sd_v3",
        "StableDiffusion3Pipeline",
        {
            1: Encoder(PENULTIMATE, "clip_l"),
            2: Encoder(PENULTIMATE, "clip_g"),
            3: Encoder(Reading("last", length=256), "t5xxl"),
        },
        "bf16",
        num_inference_steps=28,
        guidance_scale=7.0,
        schedulers=FLOW,
        optional_encoders=(3,),
    ),
    _FLUX,
    replace(  # FLUX.1-schnell, with the settings of its model card
        _FLUX,
        name="flux_schnell",
        encoders=_FLUX.encoders | {2: Encoder(Reading("last", length=256), "t5xxl")},
        distinguished_by=("transformer", "guidance_embeds", (False, None)),
        model_type="flux",
        num_inference_steps=4,
        guidance_scale=0.0,
        max_sequence_length=256,
    ),
    # T5 masks the padding. The transformer then attends to the prompt's tokens and one padding token only.
    Family(
        "chroma",
        "ChromaPipeline",
        {1: Encoder(Reading("last", attention_mask=True, length=512), "t5xxl")},
        "bf16",
        num_inference_steps=35,
        guidance_scale=5.0,
        schedulers=FLOW,
        modes=("text",),
    ),
)
FAMILIES = {family.name: family for family in _FAMILIES}
MODEL_TYPES = tuple(FAMILIES)
PIPELINES = tuple(dict.fromkeys(family.pipeline for family in _FAMILIES))
MOST_ENCODERS = max(max(family.encoders) for family in _FAMILIES)
EXPORTS = ("pipeline", "hf", "comfyui", "a1111", "lora")


def find_family(pipeline: str, config_of: Callable[[str], Mapping[str, Any] | None]) -> Family | None:
    """Return the family of a pipeline class, None for unknown classes.

    `config_of` returns the configuration of a component by its name, None if it is missing. It is called if families share the class.
    """
    among = [family for family in _FAMILIES if family.pipeline == pipeline]
    for family in among[1:]:
        component, entry, values = family.distinguished_by
        config = config_of(component)
        if config is not None and config.get(entry) in values:
            return family
    return among[0] if among else None


def described(setting: str) -> str:
    """Return a setting's default and the families with another one, for its option's help: `7.5; sd_v3 7, flux 3.5`."""
    values = {name: getattr(family, setting) for name, family in FAMILIES.items()}
    default = values["sd_v1"]
    return f"{default}; " + ", ".join(f"{name} {value:g}" for name, value in values.items() if value != default)


def described_lengths() -> str:
    """Return how many tokens each family's T5 reads, for the help of `--max_sequence_length`: `sd_v3 256, flux 512`."""
    return ", ".join(f"{name} {family.t5_length}" for name, family in FAMILIES.items() if family.t5_length)


def described_dtypes() -> str:
    """Return the families by their default dtype, for the help of `--dtype`: `fp32 for sd_v1, sd_v2; ...`."""
    names = {dtype: [f.name for f in FAMILIES.values() if f.dtype == dtype] for dtype in DTYPES}
    return "; ".join(f"{dtype} for {', '.join(of)}" for dtype, of in names.items())


def exports_to(family: Family, name: str) -> bool:
    """Whether a family's encoders can be exported in a format, one of EXPORTS."""
    if name == "comfyui":
        return all(encoder.comfyui for encoder in family.encoders.values())
    return name in ("pipeline", "hf", *family.exports)
