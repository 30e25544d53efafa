"""The public prompt sets: what each of them tests, where it comes from, and which of its columns are kept."""

from dataclasses import dataclass

PAPER = "https://github.com/amoeba04/des"
PAPER_FILES = "https://raw.githubusercontent.com/amoeba04/des/main/datasets/"
GITHUB = "https://raw.githubusercontent.com/"
I2P_COLUMNS = ("categories", "sd_seed", "sd_guidance_scale", "sd_image_width", "sd_image_height")
SEEDS = ("case_number", "evaluation_seed", "evaluation_guidance")
COCO_ROWS = 9969  # of the 10,000, as the paper


@dataclass(frozen=True)
class PromptSet:
    """One set. The columns are those of its source; all that is written beside `prompt` keeps its name.

    `use` is "generate" (prompts that minors are kept out of) or "train" (every row: the encoder must learn to refuse them);
    `sexual` says that the set as a whole is. A set has a `url` or a data set `hub` on the Hugging Face hub, or neither: then
    its owner must ask at `page` for it. Where `pairs` names a category, it is written as NAME_safe and NAME_unsafe. Where
    `images_of` names another set, it is the archive of the images that the set's column `case_number` numbers.
    """

    tests: str
    licence: str
    use: str = "generate"
    sexual: bool = False
    url: str | None = None
    hub: str | None = None
    page: str = ""
    gated: bool = False
    column: str = "prompt"  # or `prompt`, where the file has no such column
    columns: tuple[str, ...] = ()  # kept; a source without them is refused
    optional: tuple[str, ...] = ()  # kept where they are
    rows: int | None = None  # as published
    sha256: str | None = None  # of the source, as published
    first: int | None = None  # only that many rows from the top
    pairs: str | None = None
    images_of: str | None = None

    def outputs(self, name: str) -> tuple[str, ...]:
        """The names, without suffix, of what the set `name` is written to."""
        return (f"{name}_safe", f"{name}_unsafe") if self.pairs else (name,)


def _paper(name: str, tests: str, rows: int, sha256: str, **others) -> dict[str, PromptSet]:
    """A file of the paper's own repository, under its own name."""
    url, licence = f"{PAPER_FILES}{name}.csv", "CC BY-NC 4.0"
    return {name: PromptSet(tests, licence, url=url, page=PAPER, rows=rows, sha256=sha256, **others)}


def _hub(repo: str, tests: str, licence: str = "on its page", **others) -> PromptSet:
    return PromptSet(tests, licence, hub=repo, page=f"https://huggingface.co/datasets/{repo}", **others)


def _copro(category: str) -> PromptSet:
    page = "https://github.com/rt219/LatentGuard"
    url, tests = f"{GITHUB}rt219/LatentGuard/main/CoPro_v1.0.json", f"training: {category} prompts and their safe partners"
    return PromptSet(tests, "BSD-3-Clause", "train", url=url, page=page, pairs=category)


_SAFETY = {"optional": I2P_COLUMNS}
_ATTACK = {"sexual": True, "optional": SEEDS}
_TRAIN = {"use": "train"}
SETS = {
    **_paper(
        "coco_prompts",
        "image quality: COCO captions",
        9969,
        "0d23e52d6baa776b05778ee5c85d718292aad257128451249850d4ee1f008fa6",
        optional=SEEDS,
    ),
    **_paper(
        "i2p_harassment_prompts",
        "safety: I2P, harassment",
        824,
        "02aa4f6e349ee08adb3c4fe31f247a33f4b6b10290c7a2d868d7c99618086c7d",
        **_SAFETY,
    ),
    **_paper(
        "i2p_hate_prompts",
        "safety: I2P, hate",
        231,
        "a49b89c311de77bfe8031049db2a91f7f59627683cd9265e269756e7bf5e6e39",
        **_SAFETY,
    ),
    **_paper(
        "i2p_illegal_prompts",
        "safety: I2P, illegal activity",
        727,
        "40d37d02b91de00bd17e96ab3dece799195d2a32c3800bacf5ae87a83888d1eb",
        **_SAFETY,
    ),
    **_paper(
        "i2p_selfharm_prompts",
        "safety: I2P, self-harm",
        801,
        "f86c14ef280b544e34a707bccc5345a010cf30c9d312fd906082db0b57330a1a",
        **_SAFETY,
    ),
    **_paper(
        "i2p_sexual_prompts",
        "safety: I2P, sexual",
        931,
        "70cc3dcdb2ed4e6ca72d2d221267cc9d830cd6a3005e4f3c75f3d5d8db25b887",
        sexual=True,
        **_SAFETY,
    ),
    **_paper(
        "i2p_shocking_prompts",
        "safety: I2P, shocking",
        856,
        "022841b9fefb8f9b6bb0b34ac10db5efd2b4f738bd0a84e308f5b7ed69ee4516",
        **_SAFETY,
    ),
    **_paper(
        "i2p_violence_prompts",
        "safety: I2P, violence",
        756,
        "150e0e2e4a43a2f4cc38e35817543eaf5674aefd9fc931b69b505003ad82077c",
        **_SAFETY,
    ),
    **_paper(
        "mma_prompts",
        "attack: MMA-Diffusion, sexual",
        1000,
        "a2ce6fa976621be9cf50bd47581706e94342ef4bddcfc6082b5d6f5ae2483357",
        **_ATTACK,
    ),
    **_paper(
        "p4d_prompts",
        "attack: P4D, sexual",
        272,
        "c8148738d23400d3f4fd12d2d14f77c71efcb63e5cd7b31bf6d7ac85c951938f",
        **_ATTACK,
    ),
    **_paper(
        "ringabell_prompts",
        "attack: Ring-A-Bell, sexual",
        107,
        "a6ebaed972dc42c98c0bc70e169a7a92e04e909348c14397ac006e79dc67d5a4",
        **_ATTACK,
    ),
    **_paper(
        "ringabell_violence_prompts",
        "attack: Ring-A-Bell, violence",
        750,
        "ae5395b86e943d4bf1b29253fdd5b5375b01f93ef29c334fc1a436e0dd19a0d7",
        optional=SEEDS,
    ),
    **_paper(
        "safe_prompts_copro_sexual",
        "training: safe partners of the sexual prompts",
        6911,
        "3c115aaa6ea65a5ae6d0318fa51f5313b23e9bdac023155c35829795d04e0080",
        **_TRAIN,
    ),
    **_paper(
        "sneaky_prompts",
        "attack: SneakyPrompt, sexual",
        124,
        "bd8cf792811fe43ed33b1e9d3a67c475b7947c3ece74c4ac650b044e607b81d0",
        **_ATTACK,
    ),
    **_paper(
        "unsafe_prompts_copro_sexual",
        "training: sexual prompts of CoPro",
        6911,
        "654a586a19a573ce8a54af89f77c158c3b7a96206287681739228a9b6081beb3",
        **_TRAIN,
    ),
    "i2p": _hub(
        "AIML-TUDA/i2p", "safety: I2P, all categories, its seeds and sizes", "MIT", sexual=True, columns=I2P_COLUMNS, rows=4703
    ),
    "copro_sexual": _copro("sexual"),
    "copro_violence": _copro("violence"),
    "copro_illegal": _copro("illegal"),
    "mma": _hub(
        "YijunYang280/MMA-Diffusion-NSFW-adv-prompts-benchmark",
        "attack: MMA-Diffusion, sexual",
        column="adv_prompt",
        gated=True,
        **_ATTACK,
    ),
    "p4d": _hub("joycenerd/p4d", "attack: P4D, sexual", gated=True, **_ATTACK),
    "ringabell": _hub(
        "Chia15/RingABell-Nudity", "attack: Ring-A-Bell, sexual", column="sensitive prompt", gated=True, **_ATTACK
    ),
    "unlearndiffatk": PromptSet(
        "attack: the prompts that UnlearnDiffAtk starts from, sexual",
        "MIT",
        url=GITHUB + "OPTML-Group/Diffusion-MU-Attack/main/prompts/nudity.csv",
        page="https://github.com/OPTML-Group/Diffusion-MU-Attack",
        **_ATTACK,
    ),
    "sneaky": PromptSet(
        "attack: SneakyPrompt, sexual", "on request", page="https://github.com/Yuchen413/text2image_safety", **_ATTACK
    ),
    "coco_10k": PromptSet(
        "image quality: COCO captions, numbers of their images, seeds",
        "on its page",
        url=GITHUB + "OPTML-Group/AdvUnlearn/main/data/prompts/coco_10k.csv",
        page="https://github.com/OPTML-Group/AdvUnlearn",
        columns=("case_number", "evaluation_seed"),
        first=COCO_ROWS,
    ),
    "coco_images": PromptSet(
        "image quality: the photographs of coco_10k, for FID",
        "of each photograph, on its page",
        url="http://images.cocodataset.org/zips/val2014.zip",
        page="https://cocodataset.org",
        images_of="coco_10k",
    ),
}
