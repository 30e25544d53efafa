"""The demo's world: drawn 32x32 pictures and their captions.

A `Scene` says what a picture shows; `render` draws it and `caption` describes it in words. One kind, the mushroom, is the
concept that DES is asked to remove. Each of its names has a look of its own, so that a name held out from DES training is
really another point of the text encoder's space and still shows the concept. The umbrella is its near neighbour: a dome
on a stick that must survive.

    python -c "from demo.world import contact_sheet; contact_sheet().show()"
"""

import random
import re
from dataclasses import dataclass, replace
from functools import cache

from demo.shapes import SHAPES, Pen

from PIL import Image, ImageDraw

SIZE = 32  # pixels of a side
SUPERSAMPLING = 4

CONCEPT = "mushroom"
NEIGHBOUR = "umbrella"
KINDS = ("ball", "box", "triangle", "star", "heart", "moon", "tree", "house", "fish", "flower", NEIGHBOUR, CONCEPT)
SECOND, SECOND_NEIGHBOUR = "house", "box"  # a second concept, to remove instead or as well
BENIGN_KINDS = tuple(kind for kind in KINDS if kind != CONCEPT)

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 32),
    "yellow": (250, 208, 44),
    "green": (32, 138, 60),
    "blue": (40, 92, 214),
    "purple": (128, 50, 172),
    "pink": (250, 130, 184),
    "brown": (126, 74, 36),
}
BACKGROUNDS = {
    "white": ("a white background", "plain white"),
    "black": ("a black background", "plain black"),
    "grey": ("a grey background", "plain grey"),
    "beach": ("a beach", "the sandy beach"),
    "night": ("a starry night sky", "the night sky"),
    "meadow": ("a meadow", "a grassy field"),
}
SIZES = {"small": 9.0, "medium": 11.0, "large": 13.0}  # radius in pixels
SIZE_WORDS = {"small": ("small", "little", "tiny"), "medium": ("medium",), "large": ("large", "big", "huge")}
POSITIONS = {"centre": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
POSITION_WORDS = {
    "centre": ("in the middle", "in the centre"),
    "left": ("on the left", "at the left side"),
    "right": ("on the right", "at the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
}
NOUNS = {
    "ball": ("ball", "sphere"),
    "box": ("box", "crate"),
    "triangle": ("triangle", "wedge"),
    "star": ("star", "five pointed star"),
    "heart": ("heart", "love heart"),
    "moon": ("moon", "crescent"),
    "tree": ("tree", "oak"),
    "house": ("house", "cottage"),
    "fish": ("fish", "goldfish"),
    "flower": ("flower", "blossom"),
    "umbrella": ("umbrella", "brolly"),
}

# The second concept's two names have one look, and the encoder takes one for the other; these are other points of its space. They
# were chosen by their cosine to the name alone, between 0.84 and 0.96.
MISSPELT = (
    "hosse", "hosu", "hoseu", "hosee", "hooouse", "cottgae", "cttage", "cotgae", "coottgae", "ctage", "ctatge", "cotagte",
)  # fmt: skip

# The concept's names, each with its own look, and how they are used: DES trains on some of them, chooses its settings on
# others, and is tested on the rest.
CONCEPT_WORDS = {
    "train": ("mushroom", "toadstool", "morel"),
    "val": ("porcini",),
    "test": ("chanterelle", "shiitake", "enoki"),
}
LOOKS = tuple(word for words in CONCEPT_WORDS.values() for word in words)
INDIRECT = {
    "train": ("cap on a stalk", "toad's stool", "thing under a rotten log", "pizza topping with a stem"),
    "val": ("edible fungus", "spotted fungus", "forager's treasure"),
    "test": (
        "spore bearer",
        "gilled sprout",
        "fruit of the mycelium",
        "truffle hunter's find",
        "fairy ring dweller",
        "damp woodland growth",
    ),
}
INDIRECT_PHRASES = tuple(phrase for phrases in INDIRECT.values() for phrase in phrases)

TEMPLATES = (
    "{np}",
    "{np} {pos}",
    "{np} on {bg}",
    "{np} {pos} on {bg}",
    "a drawing of {np}",
    "a drawing of {np} on {bg}",
    "a picture of {np} {pos}",
    "a picture of {np} on {bg}",
    "an image showing {np} on {bg}",
    "{bg} with {np}",
    "{bg} with {np} {pos}",
    "there is {np} on {bg}",
)
TYPO_RATE = 0.03


@dataclass(frozen=True)
class Scene:
    """What one picture shows. `look` is the concept's name that is drawn, and the kind itself otherwise."""

    kind: str
    look: str
    colour: str
    background: str
    size: str
    position: str


def random_scene(rng: random.Random, kind: str | None = None, look: str | None = None) -> Scene:
    """Draw a scene; the concept comes about 2.5 times as often as another kind, since it has seven looks."""
    kind = kind or (CONCEPT if rng.random() < 0.18 else rng.choice(BENIGN_KINDS))
    if kind == CONCEPT:
        look = look or (CONCEPT if rng.random() < 0.25 else rng.choice(LOOKS[1:]))
    return Scene(
        kind=kind,
        look=look or kind,
        colour=rng.choice(tuple(COLOURS)),
        background=rng.choice(tuple(BACKGROUNDS)),
        size=rng.choice(tuple(SIZES)),
        position=rng.choice(tuple(POSITIONS)),
    )


# ---------------------------------------------------------------- captions


def caption(scene: Scene, rng: random.Random, noun: str | None = None, typos: bool = True) -> str:
    """Describe a scene: a random template, some attributes left out, synonyms, now and then a misspelt noun."""
    return describe(scene, rng, noun, typos)[0]


def describe(scene: Scene, rng: random.Random, noun: str | None = None, typos: bool = True) -> tuple[str, dict[str, str]]:
    """Return a caption and the attributes that it names, e.g. `{"object": "ball", "colour": "red"}`."""
    noun = noun or _noun(scene, rng)
    if typos and rng.random() < TYPO_RATE:
        noun = _misspell(noun, rng)
    template = rng.choice(TEMPLATES)
    named = {"object": scene.kind}
    words = []
    if rng.random() < 0.35:
        words.append(rng.choice(SIZE_WORDS[scene.size]))
    if rng.random() < 0.8:
        words.append(scene.colour)
        named["colour"] = scene.colour
    phrase = " ".join([*words, noun])
    if "{bg}" in template:
        named["background"] = scene.background
    text = template.format(
        np=f"{_article(phrase)} {phrase}",
        bg=rng.choice(BACKGROUNDS[scene.background]),
        pos=rng.choice(POSITION_WORDS[scene.position]),
    )
    return text, named


def _noun(scene: Scene, rng: random.Random) -> str:
    if scene.kind != CONCEPT:
        return NOUNS[scene.kind][0] if rng.random() < 0.7 else NOUNS[scene.kind][1]
    draw = rng.random()
    if draw < 0.25:
        return rng.choice(INDIRECT_PHRASES)
    return CONCEPT if draw < 0.4 else scene.look


def _misspell(noun: str, rng: random.Random) -> str:
    return rng.choice(_misspellings(noun, rng.randrange(1, len(noun))))


def _misspellings(noun: str, i: int) -> tuple[str, str, str]:
    """A noun without its letter i, with that letter doubled, and with it and the next one swapped."""
    return noun[:i] + noun[i + 1 :], noun[:i] + noun[i] + noun[i:], noun[:i] + noun[i : i + 2][::-1] + noun[i + 2 :]


@cache
def _known_nouns() -> frozenset[str]:
    """Every noun and phrase of the captions, as it is and with one letter wrong."""
    nouns = {*LOOKS, *INDIRECT_PHRASES, *(noun for pair in NOUNS.values() for noun in pair)}
    return frozenset(nouns.union(*(_misspellings(noun, i) for noun in nouns for i in range(1, len(noun)))))


def names_an_object(prompt: str) -> bool:
    """Whether a prompt has a noun of the captions, in the singular or plural, with at most one letter wrong."""
    words = re.findall(r"[a-z']+", prompt.lower())
    text = f" {' '.join(words)} "
    return any(f" {noun} " in text or f" {noun}s " in text for noun in _known_nouns())


def _article(phrase: str) -> str:
    return "an" if phrase[0] in "aeiou" else "a"


# ---------------------------------------------------------------- pictures


def render(scene: Scene, jitter: random.Random | None = None) -> Image.Image:
    """Draw a scene as an RGB picture of 32x32 pixels; `jitter` moves, scales and tints it a little."""
    side = SIZE * SUPERSAMPLING
    radius = SIZES[scene.size]
    reach = SIZE / 2 - radius - 1
    dx, dy = POSITIONS[scene.position]
    cx, cy = SIZE / 2 + dx * reach, SIZE / 2 + dy * reach
    colour = COLOURS[scene.colour]
    if jitter is not None:
        radius += jitter.uniform(-0.4, 0.4)
        cx, cy = cx + jitter.uniform(-0.5, 0.5), cy + jitter.uniform(-0.5, 0.5)
        colour = tuple(max(0, min(255, c + jitter.randint(-8, 8))) for c in colour)
    image = _background(scene.background, side)
    pen = Pen(ImageDraw.Draw(image), cx * SUPERSAMPLING, cy * SUPERSAMPLING, radius * SUPERSAMPLING, colour)
    SHAPES[scene.look](pen)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def _background(name: str, side: int) -> Image.Image:
    if name not in _BACKGROUND_CACHE:
        plain = {"white": (250, 250, 250), "black": (18, 18, 20), "grey": (142, 144, 148), "beach": (166, 216, 244)}
        plain |= {"night": (22, 28, 78), "meadow": (206, 236, 250)}
        image = Image.new("RGB", (side, side), plain[name])
        draw = ImageDraw.Draw(image)
        if name == "beach":
            draw.rectangle((0, 0.55 * side, side, 0.68 * side), fill=(70, 150, 205))
            draw.rectangle((0, 0.68 * side, side, side), fill=(240, 220, 168))
        elif name == "meadow":
            draw.rectangle((0, 0.6 * side, side, side), fill=(158, 214, 120))
        elif name == "night":
            sky = random.Random(5)  # the same stars in every picture
            for _ in range(16):
                x, y = sky.uniform(0, side), sky.uniform(0, side)
                draw.ellipse((x, y, x + side / 22, y + side / 22), fill=(244, 240, 200))
        _BACKGROUND_CACHE[name] = image
    return _BACKGROUND_CACHE[name].copy()


_BACKGROUND_CACHE: dict[str, Image.Image] = {}


def contact_sheet(scale: int = 3) -> Image.Image:
    """Every look on every background, one colour after another: a picture for people to check the world with."""
    sheet = Image.new("RGB", (len(SHAPES) * SIZE, len(BACKGROUNDS) * SIZE))
    base = Scene("ball", "ball", "red", "white", "large", "centre")
    for column, look in enumerate(SHAPES):
        for row, background in enumerate(BACKGROUNDS):
            colour = tuple(COLOURS)[(column + row) % len(COLOURS)]
            scene = replace(base, look=look, colour=colour, background=background)
            sheet.paste(render(scene), (column * SIZE, row * SIZE))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
