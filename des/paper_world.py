"""The paper's tables in its own world: Stable Diffusion and FLUX, the public prompt sets, NudeNet and Q16."""

from collections.abc import Mapping
from pathlib import Path

from des.encoders import read_index
from des.jobs import ROOT
from des.reproduction import PromptSet, World

I2P = ("violence", "illegal", "hate", "self-harm", "harassment", "shocking")
TITLES = {  # rows of the original model and of the protected one, by the pipeline's class
    "StableDiffusionPipeline": ("SD v1.5", "DES"),
    "StableDiffusionXLPipeline": ("SDXL", "DES-XL"),
    "StableDiffusion3Pipeline": ("SD3.5", "DES-3.5"),
    "FluxPipeline": ("FLUX.1", "DES-FLUX"),
}
FILES = {
    "sneaky": "sneaky_prompts", "mma": "mma_prompts", "rab": "ringabell_prompts", "p4d": "p4d_prompts",
    "i2p_sexual": "i2p_sexual_prompts", "benign": "coco_prompts", "uda": "unlearndiffatk",
    **{f"i2p_{name}": f"i2p_{name.replace('-', '')}_prompts" for name in I2P},
}  # fmt: skip
SEXUAL = {"sneaky", "mma", "rab", "p4d", "i2p_sexual", "uda"}
ATTACKED = {  # prompts that an attack made against one model, which nobody publishes
    "mma_whitebox": "MMA against this encoder", "rab_whitebox": "Ring-A-Bell against this encoder", "cce": "CCE against this model",
    "i2i_text_black": "image to image, text", "i2i_both_black": "image to image, text and image",
    "i2i_text_white": "image to image, text against this encoder", "i2i_both_white": "image to image, both against this model",
}  # fmt: skip


def paper_world(
    model_path: str,
    prompts: Mapping[str, Path],
    reference: Path,
    q16_prompts: Path | None,
    images: Path | None,
    masks: Path | None,
) -> World:
    """The paper's set-up as a World.

    `prompts` are CSVs for sets that are not at their place in datasets/, `reference` the COCO images for FID, `images` and
    `masks` what image to image starts from. Without `q16_prompts` the tables of Q16 stay empty.
    """
    datasets = ROOT / "datasets"
    sets = {
        name: PromptSet(
            name, prompts.get(name, datasets / f"{stem}.csv"), f"python datasets/download.py {stem}", sexual=name in SEXUAL
        )
        for name, stem in FILES.items()
    }
    for name, title in ATTACKED.items():
        csv, how = prompts.get(name, datasets / f"{name}.csv"), f"prompts of an attack: --prompts {name}=CSV"
        start = {"init": images or Path("--i2i_images"), "masks": masks} if name.startswith("i2i") else {}
        sets[name] = PromptSet(title, csv, how, sexual=True, **start)
    four = {"Sneaky": "sneaky", "MMA": "mma", "RAB": "rab", "P4D": "p4d"}
    original, protected = TITLES[read_index(model_path)["_class_name"]]
    return World(
        original=original,
        protected=protected,
        concept_prompt="nudity",
        unsafe_csv=datasets / "unsafe_prompts_copro_sexual.csv",
        safe_csv=datasets / "safe_prompts_copro_sexual.csv",
        training={"learning_rate": 1e-5, "num_epochs": 2, "batch_size": 128, "lambda_safe": 0.3, "concept_guidance_scale": 200.0},
        alpha=lambda alpha: ("concept_guidance_scale", alpha),
        sampling=(),
        sets=sets,
        columns={
            "T2": four,
            "T3": {"MMA": "mma_whitebox", "UDA": "uda", "RAB": "rab_whitebox", "CCE": "cce"},
            "T4": {
                "text, black box": "i2i_text_black", "text + image, black box": "i2i_both_black",
                "text, white box": "i2i_text_white", "text + image, white box": "i2i_both_white",
            },
            "T5": {name: f"i2p_{name}" for name in I2P},
            "T6": {"Sneaky": "sneaky", "MMA": "mma", "I2P": "i2p_sexual", "RAB": "rab", "P4D": "p4d"},
            "T7": {"Sneaky": "sneaky", "MMA": "mma", "I2P": "i2p_sexual", "RAB": "rab", "P4D": "p4d"},
        },
        reference=reference,
        scoring={"classify": ("nudenet",), **({"classify_16": ("q16", "--prompts_file", str(q16_prompts))} if q16_prompts else {})},
        asr="classify",
        explicit="i2p_sexual",
        scales={"smoke": (4, 8), "small": (100, 500), "paper": (None, None)},
        classes={
            "breast F": "FEMALE_BREAST_EXPOSED", "genitalia F": "FEMALE_GENITALIA_EXPOSED", "breast M": "MALE_BREAST_EXPOSED",
            "genitalia M": "MALE_GENITALIA_EXPOSED", "buttocks": "BUTTOCKS_EXPOSED", "feet": "FEET_EXPOSED", "belly": "BELLY_EXPOSED",
            "armpits": "ARMPITS_EXPOSED",
        },
        preference=True,
        setup=(
            "ASR by NudeNet's profile `paper`; FID's variant `paper`; sampler, steps and guidance are the defaults of generate.py, which "
            "are the public code's. The paper states neither sampler nor seeds.",
            "The public COCO list has 9,969 captions, the paper says 10k.",
        ),
    )  # fmt: skip
