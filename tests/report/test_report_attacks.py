"""Attacks in the report: which model a result belongs to, the figures on the page, what is refused, and which found prompts are quoted."""

import json
import shutil
from pathlib import Path

from des.report.attacks import attack_rows
from des.report.collect import AttackRun, collect_attacks
from des.report.compare import compare, headline, worst_case
from des.report.figures import paretos
from des.report.page import Options, _model_report, render
from des.utils.errors import UserError
from des.utils.files import sha256_texts
from des.utils.stats import proportion

import pandas as pd
import pytest
from attack_results import HOSTILE, IDENTITIES, PROMPTS, result
from test_report_pairing import asr, des, fid, run


def read(folder: Path) -> list[AttackRun]:
    return collect_attacks([folder])


def images(identity: str, encoder: str = "one") -> list:
    """Runs of an original and of a protected model: an attack set, with the same detector as the attacks, and a benign set."""
    runs = [run("plain", asr(10), components=IDENTITIES), des("plain", asr(0), encoder=encoder, components=IDENTITIES)]
    runs += [run("benign", fid(1.0), components=IDENTITIES), des("benign", fid(2.0), encoder=encoder, components=IDENTITIES)]
    for each in runs[:2]:
        object.__setattr__(each.scores[0], "identity", identity)
    return runs


@pytest.fixture
def compared(tmp_path):
    """Compare the runs with results of attacks in tmp_path."""

    def of(**options):
        attacks = read(tmp_path)
        (comparison,) = compare(images(attacks[0].detector, **options), None, attacks)
        return comparison

    return of


def page(comparison, **options) -> str:
    report = _model_report(comparison, "c", Options(pictures=False, **options))
    return render(model_reports=[report], other_attacks=["x/<b>"], losses=[], maps=[], provenance_entries=[])


# ---------------------------------------------------------------- figures


def test_the_page_has_each_attack_beside_its_control(tmp_path, compared):
    result(tmp_path / "mma_short", (3, 1), (10, 9))
    result(tmp_path / "mma_long", (0, 0), (8, 7), steps=90)
    html = page(compared())
    rows = html.split('id="attacks-title"')[1].split("<tbody>")[1].split("</tbody>")[0].split("<tr>")[1:]
    long, short = sorted(rows)
    assert "MMA-Diffusion" in short and "mma_short: tokens 4, steps 60" in short and "mma_long: tokens 4, steps 90" in long
    shown = [cell.split("</b>")[0] for cell in short.split("<b>")[1:]]
    assert shown == ["30.0%", "10.0%", "100.0%", "90.0%"]  # attacked and original, each with and without names
    assert "3/10 [10.8, 60.3]" in short and "before: 0/10" in short and "2.0 s<small>1.5 images" in short
    assert "too weak" not in short and long.count("too weak to tell") == 1 and long.count("below 80.0%") == 1
    assert "only if the same attack succeeds on the original model, its control" in html
    assert "found attack" not in html and "x/&lt;b&gt;" in html


def test_the_headline_and_the_trade_off_have_the_worst_attack(tmp_path, compared):
    result(tmp_path / "mma", (3, 1), (10, 9))
    result(tmp_path / "uda", (0, 0), (5, 7), name="uda")
    comparison = compared()
    phrases = headline(comparison)
    assert phrases[:2] == [
        "ASR of mushroom, plain: 100.0% → 0.0%",
        "ASR of mushroom, worst white-box attack: 100.0% → 30.0%",
    ]
    assert phrases[-1] == "attacks too weak to tell: 1 of 2"
    (measure,) = comparison.of_kind("attacked")
    assert [score.counts for score in measure.scores] == ["mma: 10/10", "mma: 3/10"]
    (worst, caption), (lists, _) = paretos(comparison, "p")
    assert caption == "ASR: largest over plain, attacks; FID (paper): benign" and "worst ASR of mushroom, %" in worst
    assert "worst" not in lists


def test_the_worst_attack_compares_models_by_the_same_attacks(tmp_path):
    """A maximum over the null attack, or over fewer attacks and sets than another model's, is no worst case."""
    result(tmp_path / "random", (0, 0), (10, 9), name="random_prefix")
    result(tmp_path / "mma_two", (9, 9), (10, 9), encoder="two")
    attacks = read(tmp_path)
    more = [des("plain", asr(5), encoder="two", components=IDENTITIES), run("names", asr(9), components=IDENTITIES)]
    more += [
        des("names", asr(8), encoder="two", components=IDENTITIES),
        des("benign", fid(3.0), encoder="two", components=IDENTITIES),
    ]
    for each in more[:3]:
        object.__setattr__(each.scores[0], "identity", attacks[0].detector)

    def compared():
        (comparison,) = compare([*images(attacks[0].detector), *more], None, read(tmp_path))
        return comparison

    (measure,) = compared().of_kind("attacked")
    assert [score and score.counts for score in measure.scores] == ["mma_two: 10/10", None, "mma_two: 9/10"]
    result(tmp_path / "mma_one", (3, 1), (10, 9), steps=90)  # of other settings
    assert [score is None for score in compared().of_kind("attacked")[0].scores] == [False, True, True]
    shutil.rmtree(tmp_path / "mma_one")
    result(tmp_path / "mma_one", (3, 1), (10, 9))
    (measure,) = compared().of_kind("attacked")
    assert [score.value for score in measure.scores] == [100.0, 30.0, 90.0]
    assert worst_case(compared(), measure).set_name == "largest over plain, attacks"
    shutil.rmtree(tmp_path / "mma_one")
    shutil.rmtree(tmp_path / "mma_two")
    assert compared().of_kind("attacked") == []


@pytest.mark.parametrize(("attacked", "says"), [((0, 0), None), ((0, 2), "20.0%")])
def test_a_weak_attack_counts_where_it_succeeds_only(tmp_path, compared, attacked, says):
    result(tmp_path / "uda", attacked, (7, 7))
    comparison = compared()
    phrases = [each for each in headline(comparison) if "worst white-box attack" in each]
    assert phrases == ([f"ASR of mushroom, worst white-box attack: 70.0% → {says}"] if says else [])
    assert "attacks too weak to tell: 1 of 1" in headline(comparison)
    assert len(paretos(comparison, "p")) == (2 if says else 1)


def test_a_model_that_was_not_attacked_is_named_in_no_attack(tmp_path):
    result(tmp_path / "mma")
    attacks = read(tmp_path)
    runs = [*images(attacks[0].detector), des("plain", asr(5), encoder="two", components=IDENTITIES)]
    (comparison,) = compare(runs, None, attacks)
    (phrase,) = [each for each in headline(comparison) if "worst white-box attack" in each]
    label = comparison.models[1].label
    assert phrase == f"ASR of mushroom, worst white-box attack: 100.0% → 30.0% ({label})"


@pytest.mark.parametrize("cells", ["control", "attack"])
def test_an_attack_on_the_original_model_alone_is_a_control(tmp_path, compared, cells):
    folder = result(tmp_path / "mma", (), (9, 8))
    content = json.loads((folder / "attack.json").read_text())
    for part in ("cells", "settings") if cells == "attack" else ():  # the names of the cells in earlier results
        content[part] = {name.replace("control", "attack"): each for name, each in content[part].items()}
    for path in folder.glob("control*.csv"):
        path.rename(folder / path.name.replace("control", cells))
    (folder / "attack.json").write_text(json.dumps(content))
    comparison = compared()
    (row,) = attack_rows(comparison, True)
    assert row.model == "original" and [pair.attacked for pair in row.pairs.values()] == [None, None] and len(row.examples) == 6
    assert [score and score.value for score in comparison.of_kind("attacked")[0].scores] == [90.0, None]
    assert page(comparison).count('title="not run"') == 2


# ---------------------------------------------------------------- whose results they are


@pytest.mark.parametrize(
    "change",
    [{"encoder": "two"}, {"components": IDENTITIES | {"unet": "another"}}, {"components": IDENTITIES | {"vae": "another"}}],
)
def test_a_result_on_another_model_is_not_shown_as_this_ones(tmp_path, compared, caplog, change):
    result(tmp_path / "mma", (0, 0), **change)
    comparison = compared()
    assert comparison.attacks == () and comparison.of_kind("attacked") == [] and "without images" in caplog.text


def test_a_control_on_another_original_model_is_none(tmp_path, compared):
    folder = result(tmp_path / "mma")
    content = json.loads((folder / "attack.json").read_text())
    content["settings"]["control"]["text_encoder_sha256"] = "another"
    (folder / "attack.json").write_text(json.dumps(content))
    assert compared().attacks == ()


def change(path: str, value):
    """Set an entry of attack.json by its path, or remove it if the value is None."""

    def edit(content):
        *parents, name = path.split("/")
        for parent in parents:
            content = content[parent]
        content.pop(name) if value is None else content.update({name: value})

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        change("cells", {}), change("rows", [0, 1]), change("settings/control", None), change("detector", {}), change("made_by", None),
        change("cells/attack/any", proportion(0, 9)), change("cells/attack/any/fraction", 0.0), change("cells/attack/any/high", None),
        change("cells/attack/before/k", -1), change("cells/attack/cost/seconds", float("nan")), change("cells/attack/model", "original"),
        change("control_floor", 0), change("too_weak_to_tell", True), change("settings/attack/concept_words", ["x"]), change("protection", []),
        lambda content: [content[part].pop("control_without_names") for part in ("cells", "settings")],
        lambda content: [content[part].pop("attack_without_names") for part in ("cells", "settings")],
        lambda content: [content[part].update({"../x": content[part].pop("attack")}) for part in ("cells", "settings")],
    ],
)  # fmt: skip
def test_a_damaged_result_is_refused(tmp_path, edit):
    path = result(tmp_path / "mma") / "attack.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not the complete result of an attack; run the attack again"):
        read(tmp_path)


def test_a_result_that_its_table_contradicts_is_refused(tmp_path):
    path = result(tmp_path / "mma", (3, 1)) / "attack.json"
    content = json.loads(path.read_text())
    content["cells"]["attack"]["any"] = proportion(0, 10)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"counts 0 successes, but attack.csv has 3"):
        read(tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read as a JSON object"):
        read(tmp_path)


# ---------------------------------------------------------------- found prompts


def edited(folder: Path, cell: str, row: int, prompt: str) -> None:
    table = pd.read_csv(folder / f"{cell}.csv")
    table.loc[row, "prompt"] = prompt
    table.to_csv(folder / f"{cell}.csv", index=False)


def test_found_prompts_are_quoted_as_text_and_on_request_only(tmp_path, compared):
    result(tmp_path / "mma", (5, 2))
    for prompts in (None, False):
        assert "found attack" not in page(compared(), prompts=prompts)
    html = page(compared(), prompts=True)
    assert html.count("<q>found attack") == 6 and "found control" not in html and "sexual context" not in html
    assert HOSTILE not in html and "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert html.count(">success</span>") == 3  # evenly spaced: rows 0, 4 and 8 with names, and 1, 5 and 9 without
    assert "row 4, prompts as they are" in html and "row 9, without the concept’s names" in html


@pytest.mark.parametrize("sexual", [True, False])
def test_what_the_safety_filter_refuses_is_counted_and_not_quoted(tmp_path, compared, sexual):
    """In a sexual attack, found prompts that name a minor, and those that were found for such a prompt, are left out."""
    folder = result(tmp_path / "mma")
    edited(folder, "attack", 0, "found attack: a child on a swing")
    targets = [*PROMPTS[:9], "two children"]
    (folder / "list.csv").write_text("\n".join(["prompt", *targets]))
    content = json.loads((folder / "attack.json").read_text())
    content["sexual"] = sexual
    for each in content["settings"].values():
        each["prompts_sha256"] = sha256_texts(targets)
    (folder / "attack.json").write_text(json.dumps(content))
    html = page(compared(), prompts=True)
    assert ("a child on a swing" in html) is not sexual and ("row 9," in html) is not sexual
    assert ("3 found prompts are left out" in html) is sexual and "two children" not in html


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "attack.csv").unlink(), "attack.csv cannot be read as the prompts that an attack found"),
        (lambda folder: (folder / "list.csv").write_text("prompt\nanother"), "leave --prompts out"),
        (lambda folder: (folder / "list.csv").unlink(), "list.csv"),
    ],
)
def test_without_the_tables_and_the_list_no_prompt_is_quoted(tmp_path, compared, spoil, says):
    spoil(result(tmp_path / "mma"))
    assert "MMA-Diffusion" in page(compared())
    with pytest.raises(UserError, match=says):
        page(compared(), prompts=True)
