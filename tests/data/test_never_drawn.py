"""The safety filter: every phrasing of its table is found, ordinary captions stay, and the time is linear."""

import itertools
import logging
import random
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

from des.data.never_drawn import kinds_of, never_drawn
from des.data.prompts import read_prompts, rows_to_draw
from des.report.pictures import _never_shown
from des.utils.files import sha256_texts

import pytest
from conftest import ROOT

TABLE = tomllib.loads((Path(__file__).parent / "never_drawn_phrasings.toml").read_text(encoding="utf-8"))
FILLER = ["a house"] * 40  # so that no list here is a sexual one


def test_the_table_has_at_least_200_phrasings():
    assert len({*TABLE["minor"], *TABLE["sexual"]}) >= 200


@pytest.mark.parametrize("phrasing", TABLE["minor"])
def test_a_phrasing_of_a_minor_is_found(phrasing):
    assert never_drawn([f"statue, nsfw, {phrasing}", *FILLER]) == [0]
    assert never_drawn(["statue, nsfw", *FILLER]) == []


@pytest.mark.parametrize("phrasing", TABLE["sexual"])
def test_a_sexual_term_is_found(phrasing):
    assert never_drawn([f"a child, {phrasing}", *FILLER]) == [0]
    assert never_drawn(["a child", *FILLER]) == []


@pytest.mark.parametrize("prompt", TABLE["stays"])
def test_what_only_looks_like_it_stays(prompt):
    assert never_drawn([prompt, *FILLER]) == []


def test_a_struck_phrase_hides_nothing_beside_it():
    assert never_drawn(["a naked mole rat watched by kids, nsfw", "chicken breast, a boy, nude", *FILLER]) == [0, 1]


@pytest.mark.parametrize(
    "prompt",
    [
        "1girl, nude, heels, smile", "a child, naked. Eyes closed", "a nude baby, blue background", "school girl, nude, color photo",  # not side by side
        "a nude baby blue-eyed", "school girl posing nude color photo", "nude beach boys", "a naked child's pose",  # beside a term of the other kind
        "\U0001f467 nude", "naked \U0001f9d2", "1girl \U0001f51e", "nude babygirl", "nude kidz", "nude eightyearold", "nude freshman in high school",
    ],
)  # fmt: skip
def test_words_that_only_look_like_a_harmless_phrase_are_found(prompt):
    assert never_drawn([prompt, *FILLER]) == [0]


def test_a_negative_prompt_counts_by_what_the_images_then_lack():
    prompts = ["a child at the beach", "a nude woman", "a house"]
    lists = {
        "clothes, blurry": [0],
        "swimsuits": [0],
        "Adults, old": [1],
        "adult, clothing": [0, 1, 2],
        "ugly, old, child, nude": [],
        None: [],
    }
    for negative, expected in lists.items():
        assert [row for row in never_drawn([*prompts, *FILLER], negative_prompt=negative) if row < 3] == expected, negative
    assert rows_to_draw(prompts[:1] * 2 + FILLER, 1, 5, "clothes") == [2, 3, 4]


def test_relatives_count_in_a_prompt_that_is_sexual_itself_only():
    prompts = ["a farmer and his daughter", "a child", *["statue, nsfw"] * 5]
    assert never_drawn(prompts, sexual_set=True) == [1]
    assert kinds_of("a daughter, nsfw") == {"minor", "sexual"}


def test_a_learned_token_counts_as_sexual_since_no_word_says_what_it_stands_for():
    assert never_drawn(["<learned-0-0> a child on a swing", *FILLER]) == [0] and never_drawn(["<learned-0-0> a boat"]) == []


def test_the_rule_for_lists_says_itself_in_the_log(caplog):
    caplog.set_level(logging.INFO, "des")
    logging.getLogger("des").addHandler(caplog.handler)
    try:
        assert never_drawn(["statue, nsfw", "a child flies a kite", *["a tower"] * 18]) == [1]
        assert never_drawn(["statue, nsfw", "a child flies a kite", *["a tower"] * 19]) == []
    finally:
        logging.getLogger("des").removeHandler(caplog.handler)
    assert "1 of 20 prompts are sexual (at least 5% of it), so all 1 that name a minor are never drawn" in caplog.text
    assert "of 21 prompts" not in caplog.text


def test_the_report_shows_no_image_of_a_prompt_that_is_never_drawn():
    prompts = ["a house", "kid, nsfw", *FILLER]
    record = {"made_by": {"arguments": {"prompt": None, "prompts_csv": "gone.csv"}}, "left_out": [7]}
    run = SimpleNamespace(record=record, settings={}, folder="images")
    assert _never_shown(run) == {7}
    record["made_by"]["arguments"]["prompt"] = prompts[1]
    run.settings["prompts_sha256"] = sha256_texts(prompts[1:2])
    assert _never_shown(run) == {0}


PEOPLE = ["a boy", "two girls", "a little kid", "a young child", "a baby", "a man", "a woman", "a group of teenagers", "a 5 year old", "several people",
          "a family", "a mother and her daughter", "three school children", "a toddler"]  # fmt: skip
DOES = ["eating chicken breast", "eating pizza with breadsticks", "playing baseball", "flying a kite", "riding a skateboard", "brushing teeth", "sitting on a bench",
        "holding a teddy bear", "petting a baby elephant", "watching a naked mole rat", "wearing a lustrous blue coat", "in baby blue pumps", "feeding the ducks",
        "standing in a kitchen", "reading a book", "playing video games", "swimming in a pool", "on a surfboard", "looking at a giraffe", "cutting a birthday cake",
        "in a baseball uniform", "wearing a swimsuit at the beach", "under an umbrella", "holding a baby carrot", "taking a picture"]  # fmt: skip
WHERE = [
    "in a park",
    "on a beach",
    "in a living room",
    "at a zoo",
    "near a fire hydrant",
    "on a snowy slope",
    "at 5 pm",
    "in front of a mirror in a bathroom",
]
THINGS = ["a bowl of fruit on a table", "a stop sign under 2 bridges", "a bathroom with a bare wall", "a black cat on a bed", "a hot dog with mustard", "two zebras and a baby zebra",
          "a strip of bacon and eggs", "a row of parked motorcycles"]  # fmt: skip


def captions() -> list[str]:
    """Captions in the style of COCO's, with children in half of them."""
    people = [" ".join(parts) for parts in itertools.product(PEOPLE, DOES, WHERE)]
    things = [f"{thing} {place}" for thing in THINGS for place in WHERE]
    return random.Random(2026).sample(people, 1500) + things


def test_at_most_one_in_a_thousand_ordinary_captions_goes():
    ordinary = captions()
    assert len(set(ordinary)) >= 1000
    assert len(never_drawn(ordinary)) <= 0.001 * len(ordinary)
    assert sum("minor" in kinds_of(caption) for caption in ordinary) > 500


def test_the_demo_lists_stay_whole():
    lists = sorted((ROOT / "datasets").glob("demo_*.csv"))
    assert lists and all(never_drawn(read_prompts(path)) == [] for path in lists)


@pytest.mark.parametrize(
    "piece",
    ["a ", "1", "é", "nude-", "12 to ", "a", "c h ", "b4", "twenty ", "子", "naked mole ", "<1", "1,000", "12 ", "\u200b"],
)
def test_time_grows_with_the_length_of_a_prompt_and_not_faster(piece):
    def seconds(length: int) -> float:
        start = time.process_time()
        never_drawn([f"nsfw {piece * length} child"])
        return time.process_time() - start

    seconds(10)
    assert seconds(20_000) < 10 * seconds(4_000) + 0.3  # 25 times where it is quadratic
