"""The model families: everything in which one family of pipelines differs from another. A new family is one entry here.

Classes are named by strings and nothing heavy is imported, so that options can be parsed before torch and diffusers load.
"""

from dataclasses import dataclass, field
from typing import Any

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # names of options, and torch's
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
MODES = ("text", "image", "inpaint")  # what a pipeline draws from
REFINER_CLASS = "StableDiffusionXLImg2ImgPipeline"


@dataclass(frozen=True)
class Reading:
    """Which tensor of an encoder's output is its embedding, [batch, rows, hidden], and how the encoder is called for it."""

    states: str  # "last": after the final layer norm; "penultimate": before the last layer; "pooled": one row
    attention_mask: bool = False  # over padding
    length: int | None = None  # tokens to pad to; None for the tokenizer's `model_max_length`


LAST, PENULTIMATE, POOLED = Reading("last"), Reading("penultimate"), Reading("pooled")


@dataclass(frozen=True)
class EncoderClass:
    """One class of text encoder: its last hidden state as the paper reads it, its dtype, and whether prompts may be of any length."""

    last_hidden_state: Reading
    dtype: str = "fp32"
    any_length: bool = False


ENCODER_CLASSES = {  # by the class that `text_encoder*/config.json` names
    "CLIPTextModel": EncoderClass(LAST),
    "CLIPTextModelWithProjection": EncoderClass(LAST),
    "T5EncoderModel": EncoderClass(Reading("last", attention_mask=True), "bf16", any_length=True),
}


@dataclass(frozen=True)
class Encoder:
    """One text encoder of a family: what the pipeline feeds to its denoiser, and ComfyUI's name of its file."""

    reading: Reading
    comfyui: str | None = None


@dataclass(frozen=True)
class Family:
    """How the pipelines of one family are opened, how their text encoders are read, and what they draw with by default."""

    name: str  # of --model_type
    pipeline: str  # the class that model_index.json names
    encoders: dict[int, Encoder]  # by their 1-based index
    dtype: str
    width: int | None = None  # hidden size of text encoder 1, which tells two families of one class apart; None for any other
    reads_use_attention_mask: bool = False  # whether the pipeline masks padding where the encoder's config.json asks for it
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    negative_prompt: bool = True
    schedulers: dict[str, str] = field(default_factory=lambda: DIFFUSION)  # diffusers' class by the option's name
    scheduler: str | None = None  # the default; None for the model's own
    modes: tuple[str, ...] = MODES
    exports: tuple[str, ...] = ()  # formats beside `pipeline`, `hf` and, where the encoders have ComfyUI names, `comfyui`
    options: dict[str, Any] = field(default_factory=dict)  # for `from_pretrained`


# Where two families have one pipeline class, the one without a width comes first and is the default.
_STABLE_DIFFUSION = {
    "pipeline": "StableDiffusionPipeline",
    "dtype": "fp32",
    "reads_use_attention_mask": True,
    "options": {"safety_checker": None, "requires_safety_checker": False},
}
_FAMILIES = (
    Family("sd_v1", encoders={1: Encoder(LAST, "clip_l")}, scheduler="ddim", exports=("a1111", "lora"), **_STABLE_DIFFUSION),
    Family("sd_v2", encoders={1: Encoder(LAST)}, width=1024, scheduler="euler", exports=("lora",), **_STABLE_DIFFUSION),
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
    ),
    Family(
        "flux",
        "FluxPipeline",
        {1: Encoder(POOLED, "clip_l"), 2: Encoder(Reading("last", length=512), "t5xxl")},
        "bf16",
        guidance_scale=3.5,
        negative_prompt=False,
        schedulers=FLOW,
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


def find_family(pipeline: str, width: int | None = None) -> Family | None:
    """The family of a pipeline class whose text encoder 1 has a hidden size; None for a class that is not known."""
    among = [family for family in _FAMILIES if family.pipeline == pipeline]
    return next((family for family in among if family.width == width), among[0] if among else None)


def shares_class(pipeline: str) -> bool:
    """Whether several families have this pipeline class, so that the width of text encoder 1 decides."""
    return sum(family.pipeline == pipeline for family in _FAMILIES) > 1


def described(setting: str) -> str:
    """The default of a setting and the families that have another one, for the help of its option: `7.5; sd_v3 7, flux 3.5`."""
    values = {name: getattr(family, setting) for name, family in FAMILIES.items()}
    default = values["sd_v1"]
    return f"{default}; " + ", ".join(f"{name} {value:g}" for name, value in values.items() if value != default)


def described_lengths() -> str:
    """How many tokens of a prompt each family's T5 reads, for the help of `--max_sequence_length`: `sd_v3 256, flux 512`."""
    lengths = {n: e.reading.length for n, f in FAMILIES.items() for e in f.encoders.values() if e.reading.length}
    return ", ".join(f"{name} {length}" for name, length in lengths.items())


def described_dtypes() -> str:
    """The families drawn in each dtype, for the help of `--dtype`: `fp32 for sd_v1 and sd_v2, ...`."""
    names = {dtype: [f.name for f in FAMILIES.values() if f.dtype == dtype] for dtype in DTYPES}
    return "; ".join(f"{dtype} for {', '.join(of)}" for dtype, of in names.items())


def exports_to(family: Family, name: str) -> bool:
    """Whether a family's encoders can be exported in a format, one of EXPORTS."""
    if name == "comfyui":
        return all(encoder.comfyui for encoder in family.encoders.values())
    return name in ("pipeline", "hf", *family.exports)
