"""Which runs the report compares, and which figures it averages; with runs that are only a record, a manifest and scores."""

import re
from pathlib import Path

from des.data.run_record import MODEL_FILES
from des.evaluation.results import Score
from des.generation.defences import METHODS
from des.report.collect import ImageRun
from des.report.compare import compare, headline, seed_columns
from des.report.figures import paretos
from des.report.naming import set_names
from des.utils.errors import UserError

import pytest
from attack_results import IDENTITIES

FACTS = {"epoch": 2, "learning_rate": 1e-5, "lambda_safe": 0.3, "seed": 1}
ARGUMENTS = {"unsafe_csv_path": "unsafe.csv", "safe_csv_path": "safe.csv", "seed": 1, "output_dir": "out1"}


def asr(k: int, n: int = 10, title: str = "ASR of mushroom") -> Score:
    content = {"images": [{"file": f"{i}p.png", "row": i, "hit": i < k} for i in range(n)]}
    return Score(Path(f"{title}.json"), "asr", title, "detector", 100 * k / n, 0, 100, f"{k}/{n}", content)


def fid(value: float) -> Score:
    return Score(Path("fid.json"), "fid", "FID (paper)", "features", value, None, None, "10 images", {})


def run(
    name: str, *scores: Score, model: str = "models/sd", method: str = "none", encoder: str = "original", **more
) -> ImageRun:
    """A run of the prompt list `name` by a model; `more` are further settings, except `protection`."""
    protection = more.pop("protection", {})
    settings = {"training_method": method, "model_path": model, "text_encoder_sha256": encoder, "prompts_sha256": name, **more}
    record = {"settings": settings, "protection": protection, "made_by": {"arguments": {}}}
    lines = {f"{i}p.png": {"file": f"{i}p.png", "row": i, "copy": 0, "seed": i, "sha256": None} for i in range(10)}
    return ImageRun(Path(f"{model}/{method}/{encoder}/{name}"), record, lines, scores)


def des(name: str, *scores: Score, encoder: str = "one", protection=None, **more) -> ImageRun:
    metadata = {"1": {"file": f"{encoder}.pt", "encoder_sha256": encoder, **(protection or {})}}
    return run(name, *scores, method="des", encoder=encoder, protection=metadata, **more)


def trained(seed: int = 1, unsafe: str = "unsafe.csv", **changes) -> dict:
    arguments = ARGUMENTS | {"seed": seed, "output_dir": f"out{seed}", "unsafe_csv_path": unsafe}
    return FACTS | {"seed": seed, "made_by": {"arguments": arguments}} | changes


def headlines(*runs: ImageRun, **options) -> list[list[str]]:
    return [headline(comparison) for comparison in compare(runs, **options)]


# ---------------------------------------------------------------- what is averaged


def of_both(*attacks: str) -> list[ImageRun]:
    """Attack sets with 10, 9, ... hits of the original model, and a benign set with 1 hit of 10."""
    runs = []
    for i, name in enumerate(attacks):
        runs += [run(name, asr(10 - i)), des(name, asr(0))]
    return [*runs, run("benign", asr(1), fid(1.0)), des("benign", asr(0), fid(2.0))]


def test_a_benign_set_is_in_no_asr():
    (comparison,) = compare(of_both("plain", "names"))
    asr_phrase, fid_phrase = headline(comparison)
    assert (
        asr_phrase == "ASR of mushroom, mean of the sets plain and names: 95.0% → 0.0%"
        and fid_phrase == "FID (paper), benign: 1.00 → 2.00"
    )
    assert [(each.name, each.benign) for each in comparison.sets] == [("plain", False), ("names", False), ("benign", True)]
    (hits,) = comparison.of_kind("benign_hits")
    assert (hits.set_name, hits.title, hits.scores[0].value) == ("benign", "benign images with a hit, mushroom", 10)
    ((plot, sets),) = paretos(comparison, "p")
    assert sets == "ASR: mean of the sets plain and names; FID (paper): benign" and "mean and range of 2 sets" in plot


def test_sets_of_the_demos_lists_are_named_in_words():
    demo, other = run("indirect", asr(9)), run("indirect", asr(9), num_inference_steps=50)
    demo.record["made_by"]["arguments"]["prompts_csv"] = "results/quickstart/prompts/demo_indirect.csv"
    assert set_names([demo, run("plain_two", asr(9))]) == ["held-out phrases", "plain two"]
    assert set_names([demo, other]) == ["held-out phrases (default steps)", "indirect (50 steps)"]


def test_the_benign_set_of_reproduce_needs_no_score_of_quality():
    assert headlines(*of_both("plain")[:2], run("benign", asr(1)), des("benign", asr(0))) == [
        ["ASR of mushroom, plain: 100.0% → 0.0%"]
    ]
    assert headlines(run("both", asr(10), fid(1.0)), des("both", asr(0), fid(2.0))) == [["FID (paper), both: 1.00 → 2.00"]]


def test_benign_sets_can_be_named():
    runs = of_both("plain")
    assert headlines(*runs, benign_sets=[]) == [["ASR of mushroom, mean of the sets plain and benign: 55.0% → 0.0%"]]
    assert headlines(*runs, benign_sets=["plain"]) == [["ASR of mushroom, benign: 10.0% → 0.0%"]]
    with pytest.raises(UserError, match="no folder of images is called plian; choose from benign, plain"):
        compare(runs, benign_sets=["plian"])


def test_only_sets_that_all_models_share_are_pooled_and_named():
    runs = [
        each
        for each in of_both("plain", "names", "phrases")
        if each.method == "none" or each.folder.name in ("names", "benign")
    ]
    (comparison,) = compare(runs)
    assert headline(comparison)[0] == "ASR of mushroom, names: 90.0% → 0.0%"
    ((plot, sets),) = paretos(comparison, "p")
    assert sets == "ASR: names; FID (paper): benign" and "of 3 sets" not in plot
    two = [run("a", asr(9)), run("b", asr(9)), des("a", asr(1)), des("b", asr(3), encoder="two")]
    assert headlines(*two) == [[]]  # the protected models share no set


def test_models_that_are_no_seeds_of_one_another_have_no_mean():
    common = [run("plain", asr(10))]
    pairs = {
        "other settings": (trained(1), trained(2, lambda_safe=0.5)),
        "other prompts": (trained(1), trained(2, unsafe="others.csv")),
        "the same seed": (trained(1), trained(1)),
        "unknown": (None, None),
    }
    for what, (first, second) in pairs.items():
        runs = [*common, des("plain", asr(1), protection=first), des("plain", asr(3), encoder="two", protection=second)]
        (comparison,) = compare(runs)
        (phrase,) = headline(comparison)
        assert "10.0% (DES" in phrase and "30.0% (DES" in phrase and "20.0%" not in phrase, what
        assert seed_columns(comparison) == [], what
    runs = [*common, *(des("plain", asr(i), encoder=f"e{i}") for i in range(6))]
    assert headlines(*runs) == [["ASR of mushroom, plain: 100.0% → 0.0% to 50.0%, 6 protected models"]]


def test_seeds_of_one_training_are_averaged():
    runs = [run("plain", asr(10)), *(des("plain", asr(k), encoder=f"e{k}", protection=trained(k)) for k in (1, 3))]
    (comparison,) = compare(runs)
    assert headline(comparison) == ["ASR of mushroom, plain: 100.0% → 20.0% (10.0 to 30.0), 2 seeds"]
    assert seed_columns(comparison) == [("DES, mean and range of 2 seeds", [1, 2])]
    assert [model.label for model in comparison.models] == ["original", "DES seed 1", "DES seed 3"]
    (comparison,) = compare([*runs, des("plain", asr(5), encoder="e5", protection=trained(1, lambda_safe=0.5))])
    assert headline(comparison) == [
        "ASR of mushroom, plain: 100.0% → 20.0% (10.0 to 30.0), 2 seeds (DES λ 0.3), 50.0% (DES λ 0.5 seed 1)"
    ]


# ---------------------------------------------------------------- what is compared

PAIRS = {
    "the same path": ({}, {}, True),
    "a trailing slash": ({}, {"model": "models/sd/"}, True),
    "another folder of that name": ({}, {"model": "elsewhere/sd"}, False),
    "another original encoder": ({"encoder": "a"}, {"protection": {"base_encoder_sha256": "b"}}, False),
    "that original encoder": ({"encoder": "a"}, {"protection": {"base_encoder_sha256": "a"}}, True),
    "the same components, moved": ({"components": IDENTITIES}, {"components": IDENTITIES | {"text_encoder": "d"}, "model": "x/sd"}, True),
    "another UNet in the folder": ({"components": IDENTITIES}, {"components": IDENTITIES | {"unet": "w"}}, False),
    "a record without identities": ({"components": IDENTITIES}, {}, True),
    "a record without identities, elsewhere": ({"components": IDENTITIES}, {"model": "x/sd"}, False),
}  # fmt: skip


@pytest.mark.parametrize("what", PAIRS)
def test_runs_are_paired_by_what_no_method_changed(what, caplog):
    original, protected, paired = PAIRS[what]
    comparisons = compare([run("plain", asr(10), **original), des("plain", asr(0), **protected)])
    assert [headline(each) for each in comparisons] == ([["ASR of mushroom, plain: 100.0% → 0.0%"]] if paired else [[], []])
    assert ("not compared" in caplog.text) is not paired
    assert len({each.base for each in comparisons}) == len(comparisons)


@pytest.mark.parametrize(("identity", "paired"), [({"unet": "w"}, True), ({"vae": "w"}, False), ({"text_encoder": "w"}, False)])
def test_a_method_may_change_its_own_component_only(identity, paired):
    esd = run("plain", asr(3), method="esd", unet_sha256="x", components=IDENTITIES | identity)
    assert len(compare([run("plain", asr(10), components=IDENTITIES), esd])) == (1 if paired else 2)


def test_the_record_knows_the_files_of_every_method():
    options = {option.removesuffix("_path") for method in METHODS.values() for option in method.options}
    assert options - {"model", "base_model"} == set(MODEL_FILES)


def test_a_run_that_fits_two_original_models_is_refused():
    known = [run("plain", asr(10), encoder=name, components=IDENTITIES | {"text_encoder": name}) for name in ("a", "b")]
    with pytest.raises(UserError, match=r"may have the original model of .* make a report of each"):
        compare([*known, des("plain", asr(0), components=IDENTITIES)])
    metadata = {"base_encoder_sha256": "b"}
    first, second = compare([*known, des("plain", asr(0), components=IDENTITIES, protection=metadata)])
    assert headline(first) == [] and headline(second) == ["ASR of mushroom, plain: 100.0% → 0.0%"]


def test_safegen_belongs_to_the_model_that_it_was_made_from():
    safegen = run("plain", asr(3), method="safegen", model="elsewhere/safegen", base_model_path="models/sd", encoder="half")
    assert headlines(run("plain", asr(10)), safegen) == [["ASR of mushroom, plain: 100.0% → 30.0%"]]


def test_what_the_record_names_does_not_split_a_set():
    original = run("plain", asr(10), components=IDENTITIES, format=2)
    protected = des("plain", asr(0), components=IDENTITIES | {"text_encoder": "d"}, format=2)
    assert headlines(original, protected) == [["ASR of mushroom, plain: 100.0% → 0.0%"]]
    assert original.conditions == protected.conditions


def test_a_setting_that_only_one_record_holds_separates_no_runs():
    old = run("plain", asr(10), num_inference_steps=20)
    new = {"components": IDENTITIES, "scheduler_sha256": "s", "num_inference_steps": 20, "high_noise_frac": None}
    assert headlines(old, des("plain", asr(0), **new)) == [["ASR of mushroom, plain: 100.0% → 0.0%"]]
    known = run("plain", asr(10), **new)
    (comparison,) = compare([known, des("plain", asr(0), **new | {"scheduler_sha256": "other"})])
    assert [len(each.runs) for each in comparison.sets] == [1, 1] and headline(comparison) == []
    assert {each.name for each in comparison.sets} == {"plain (scheduler settings 1)", "plain (scheduler settings 2)"}
    with pytest.raises(UserError, match=r"may have the prompts and settings of .* make a report of each"):
        compare(
            [
                known,
                des("plain", asr(0), **new | {"scheduler_sha256": "other"}),
                des("plain", asr(2), encoder="two", num_inference_steps=20),
            ]
        )


@pytest.mark.parametrize(("changes", "names"), [
    ({"num_inference_steps": 50}, {"held out (20 steps)", "held out (50 steps)"}), ({"dtype": "fp16"}, {"held out (dtype default)", "held out (dtype fp16)"}),
    ({"init_images_sha256": "a"}, {"held out (init images 1)", "held out (init images 2)"}), ({"deterministic": True}, {"held out"}),
])  # fmt: skip
def test_sets_are_named_in_words_by_the_sampling_that_differs(changes, names):
    common = {"num_inference_steps": 20, "init_images_sha256": "b"}
    (comparison,) = compare([run("held_out", asr(10), **common), des("held_out", asr(0), **common | changes)])
    assert {each.name for each in comparison.sets} == names and len(comparison.sets) == len(names)


def test_an_axis_shows_three_intervals_at_least():
    def clip(value: float, half: float) -> Score:
        return Score(Path("clip.json"), "mean", "CLIP score", "clip", value, value - half, value + half, "10 images", {})

    def height(half: float) -> float:
        """How far apart the plot puts two CLIP scores of 30.0 and 31.0, in its points."""
        runs = [run("a", asr(9)), des("a", asr(1)), run("benign", clip(31, half)), des("benign", clip(30, half))]
        ((plot, _),) = paretos(compare(runs)[0], "p")
        line = re.search(r'<path d="M ([\d.]+) ([\d.]+) \s*L ([\d.]+) ([\d.]+) [^>]*stroke-dasharray', plot)
        return abs(float(line[2]) - float(line[4]))

    assert height(2) < 0.5 * height(0.1)
