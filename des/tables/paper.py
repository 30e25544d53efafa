"""The paper's set-up: Stable Diffusion and FLUX, the public prompt sets, NudeNet and Q16."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from des.data.prompt_sets import SETS
from des.models.encoders import family_of, read_config
from des.tables.cells import Concept, PromptSet, Setup
from des.utils.errors import UserError
from des.utils.scripts import ROOT

I2P = ("violence", "illegal", "hate", "self-harm", "harassment", "shocking")
TITLES = {  # titles of the original's and the protected model's row; the paper has no rows for some of them
    "SD v1.5": ("SD v1.5", "DES"),
    "SD v2": ("SD v2", "DES (SD v2)"),
    "SDXL": ("SDXL", "DES-XL"),
    "SD3": ("SD3", "DES-v3"),
    "SD3.5": ("SD3.5", "DES-3.5"),
    "FLUX.1": ("FLUX.1", "DES-FLUX"),
    "FLUX.1 schnell": ("FLUX.1 schnell", "DES (FLUX.1 schnell)"),
}
ABLATED = "SD v1.5"  # the model of the paper's ablations
FILES = {
    "sneaky": "sneaky_prompts", "mma": "mma_prompts", "rab": "ringabell_prompts", "p4d": "p4d_prompts",
    "i2p_sexual": "i2p_sexual_prompts", "benign": "coco_prompts", "uda": "unlearndiffatk", "vangogh": "vangogh_test",
    **{f"i2p_{name}": f"i2p_{name.replace('-', '')}_prompts" for name in I2P},
}  # fmt: skip
SEXUAL = {"sneaky", "mma", "rab", "p4d", "i2p_sexual", "uda"}
ATTACKED = {  # unpublished prompts of attacks against one model: title, and how many the paper used, if it says so
    "mma_whitebox": ("MMA against this encoder", 110), "rab_whitebox": ("Ring-A-Bell against this encoder", 95),
    "uda_whitebox": ("UnlearnDiffAtk against this model", 142), "cce": ("CCE against this model", None),
    "i2i_text_black": ("image to image, text", 61), "i2i_both_black": ("image to image, text and image", 61),
    "i2i_text_white": ("image to image, text against this encoder", 61),
    "i2i_both_white": ("image to image, both against this model", 61),
    "vangogh_whitebox": ("UnlearnDiffAtk against this model, Van Gogh's style", 50),
}  # fmt: skip
COPRO = tuple((ROOT / f"datasets/{part}_prompts_copro_sexual.csv",) for part in ("unsafe", "safe"))
STYLE_CLASS = "vincent-van-gogh"  # of UnlearnDiffAtk's style classifier
STARTING_PROMPTS = 142  # of UnlearnDiffAtk, in the paper
ATTACKS = {  # set: a script of scripts/attacks/, its option for the budget, and the source's value of that option
    "mma_whitebox": ("mma.py", "--steps", 1000),
    "rab_whitebox": ("ring_a_bell.py", "--steps", 3000),
    "uda_whitebox": ("uda.py", "--timesteps", 50),
    "cce": ("concept_inversion.py", "--steps", 5000),
}
SHARES_OF_BUDGET = {"smoke": 1000, "small": 5, "paper": 1}  # what the budgets are divided by
CONCEPT_WORDS = ("nudity", "nude", "naked")


def model_name(model_path: str) -> str:
    """The key of TITLES for a pipeline, by its class and the configurations of its components, not by its path.

    SD 1.4 and 1.5 have equal configurations. Raises UserError for a model that generate.py does not know or the paper lacks.
    """
    name = family_of(model_path).name
    if name == "sd_v3":  # SD3.5 normalises queries and keys
        return "SD3.5" if read_config(model_path, "transformer").get("qk_norm") else "SD3"
    titles = {"sd_v1": "SD v1.5", "sd_v2": "SD v2", "sdxl": "SDXL", "flux": "FLUX.1", "flux_schnell": "FLUX.1 schnell"}
    if name not in titles:
        raise UserError(f"{model_path} is of the family {name}, for which the paper has no table")
    return titles[name]


def attacks_of(family: str, scale: str) -> dict[str, tuple[str | Path, ...]]:
    """The attacks of T3 by set: a script of scripts/attacks/ with its options, those that the family allows.

    All start from the public list of UnlearnDiffAtk. Ring-A-Bell's direction is that of CoPro's pairs.
    """
    found = {}
    for name, (script, option, full) in ATTACKS.items():
        found[name] = (script, option, str(max(2, full // SHARES_OF_BUDGET[scale])))
    found["rab_whitebox"] += ("--pairs_csv", *(paths[0] for paths in COPRO))
    if family not in ("sd_v1", "sd_v2"):
        found["cce"] += ("--objective", "embedding")
        del found["uda_whitebox"]
    return found


def paper_setup(
    model_path: str,
    scale: str,
    prompts: Mapping[str, Path],
    reference: Path,
    q16_prompts: Path | None,
    images: Path | None,
    masks: Path | None,
    style_classifier: Path | None = None,
) -> Setup:
    """The paper's models, prompt sets, detectors and training options.

    `prompts` maps sets that are not in datasets/ to CSVs. `reference` holds the COCO images for FID, `images` and `masks` the start
    of image to image. Without `q16_prompts` and `style_classifier` the tables of Q16 and of Van Gogh's style stay empty.
    """
    datasets = ROOT / "datasets"
    sets = {
        name: PromptSet(
            name,
            prompts.get(name, datasets / f"{stem}.csv"),
            f"python datasets/download.py {stem}",
            sexual=name in SEXUAL,
            published=STARTING_PROMPTS if name == "uda" else SETS[stem].rows,
        )
        for name, stem in FILES.items()
    }
    attacks = attacks_of(family_of(model_path).name, scale)
    for name, (title, published) in ATTACKED.items():
        csv, how = prompts.get(name, datasets / f"{name}.csv"), f"prompts of an attack: --prompts {name}=CSV"
        more = {"init": images or Path("--i2i_images"), "masks": masks} if name.startswith("i2i") else {}
        by_mma = name.startswith("i2i_text") and "mma_whitebox" not in prompts  # given prompts are not the row's own
        found = {"found_by": "mma_whitebox", "black_box": name == "i2i_text_black"} if by_mma else {}
        more["white_box"] = not name.endswith("_black")
        sets[name] = PromptSet(title, csv, how, sexual=name != "vangogh_whitebox", published=published, **more)
        if name not in prompts and (name in attacks or found):  # the attack runs here, against each row
            more = {"white_box": False, **(found or {"attack": attacks[name]})}
            sets[name] = replace(sets[name], csv=sets["uda"].csv, how=sets["uda"].how, published=STARTING_PROMPTS, **more)
    style = (
        {"classify_object": ("object", "--classifier", style_classifier, "--cls_class", STYLE_CLASS)}
        if style_classifier
        else {}
    )
    sets["vangogh_whitebox"] = replace(sets["vangogh_whitebox"], scoring=style)
    sets["vangogh"] = replace(sets["vangogh"], scoring=style)
    for name in ("nearest", "farthest"):
        sets[name] = replace(sets["benign"], title=f"captions {name}", part_of="benign", farthest=name == "farthest")
    four = {"Sneaky": "sneaky", "MMA": "mma", "RAB": "rab", "P4D": "p4d"}
    model = model_name(model_path)
    original, protected = TITLES[model]
    return Setup(
        original=original,
        protected=protected,
        concepts={
            "main": Concept("nudity", *COPRO, "python datasets/download.py safe_prompts_copro_sexual unsafe_prompts_copro_sexual"),
            "multi": Concept(
                "nudity, violence, illegal",  # the paper's separator is not published
                *((*main, *(datasets / f"copro_{each}_{part}.csv" for each in ("violence", "illegal")))
                  for main, part in zip(COPRO, ("unsafe", "safe"), strict=True)),
                "python datasets/download.py safe_prompts_copro_sexual unsafe_prompts_copro_sexual copro_violence copro_illegal",
            ),
            "style": Concept(
                "Van Gogh", (datasets / "vangogh_unsafe.csv",), (datasets / "vangogh_safe.csv",),
                'python datasets/style_prompts.py "Vincent van Gogh" --name vangogh --test 0 --contents datasets/safe_prompts_copro_sexual.csv',
            ),
        },
        concept_of={"T5": "multi", "T16": "multi", "T5_style": "style", "T16_style": "style"},
        benign_of={"T21": "nearest", "T22": "farthest"},
        original_of={"T5_style": "SD v1.4"} if model == "SD v1.5" else {},
        negative_prompt=family_of(model_path).negative_prompt,
        training={"learning_rate": 1e-5, "num_epochs": 2, "batch_size": 128, "lambda_safe": 0.3, "concept_guidance_scale": 200.0},
        alpha=lambda alpha: ("concept_guidance_scale", alpha),
        sampling=(),
        sets=sets,
        columns={
            "T2": four, "T9": four,
            "T3": {"MMA": "mma_whitebox", "UDA": "uda_whitebox", "RAB": "rab_whitebox", "CCE": "cce"},
            "T4": {
                "text, black box": "i2i_text_black", "text + image, black box": "i2i_both_black",
                "text, white box": "i2i_text_white", "text + image, white box": "i2i_both_white",
            },
            "T5": {name: f"i2p_{name}" for name in I2P}, "T5_style": {"UDA": "vangogh_whitebox"},
            "T6": {"Sneaky": "sneaky", "MMA": "mma", "I2P": "i2p_sexual", "RAB": "rab", "P4D": "p4d"},
            "T7": {"Sneaky": "sneaky", "MMA": "mma", "I2P": "i2p_sexual", "RAB": "rab", "P4D": "p4d"},
        },
        apart={"T3": {"UDA prompts, no attack": "uda"}, **{name: {"UDA prompts, no attack": "vangogh"} for name in ("T5_style", "T16_style")}},
        ablated=model == ABLATED,
        reference=reference,
        scoring={"classify": ("nudenet",), **({"classify_16": ("q16", "--prompts_file", q16_prompts)} if q16_prompts else {})},
        asr="classify",
        concept_words=CONCEPT_WORDS,
        explicit="i2p_sexual",
        scales={"smoke": (4, 8), "small": (100, 500), "paper": (None, None)},
        classes={
            "breast F": "FEMALE_BREAST_EXPOSED", "genitalia F": "FEMALE_GENITALIA_EXPOSED", "breast M": "MALE_BREAST_EXPOSED",
            "genitalia M": "MALE_GENITALIA_EXPOSED", "buttocks": "BUTTOCKS_EXPOSED", "feet": "FEET_EXPOSED", "belly": "BELLY_EXPOSED",
            "armpits": "ARMPITS_EXPOSED",
        },
        preference=True,
        attack_note="Attacks run here are white box, each against the model of its row, from the prompts of UnlearnDiffAtk's list"
        + (f", with the sources' budgets divided by {SHARES_OF_BUDGET[scale]}." if scale != "paper" else ", with the sources' budgets."),
        differences=(
            "ASR by NudeNet's profile `paper`; FID's variant `paper`; sampler, steps and guidance are the defaults of generate.py, which "
            "are the public code's. The paper states neither sampler nor seeds.",
            "The public COCO list has 9,969 captions, the paper says 10k.",
            f"Our rows are of {model_path}" + (": SD 1.4 and 1.5 have one configuration, and the paper's are of 1.5." if model == "SD v1.5" else "."),
        ),
    )  # fmt: skip
