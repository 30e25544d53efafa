"""T3 and T4: the attacks that fill their cells, with which budgets, beside which control, and the texts that they found on images."""

import json
from pathlib import Path

import des.tables.paper
from des.tables.cells import ORIGINAL, Variant
from des.tables.jobs import Job, JobRecords
from des.tables.notes import paired_notes, protection_notes
from scripts import reproduce

import pytest
from attack_results import result
from conftest import ROOT
from test_reproduce import reproduce as run_reproduce  # noqa: F401
from test_table_cells import arguments, lists, runner_of  # noqa: F401

DEMO = ROOT / "demo/models/pipeline"
PROTECTED = ROOT / "demo/models/protected/checkpoint-20.safetensors"


@pytest.fixture
def public_lists(tmp_path, monkeypatch):
    """UnlearnDiffAtk's list and CoPro's, with harmless prompts, in place of those of datasets/; returns the option for the former."""
    for name in ("uda", "unsafe", "safe"):
        (tmp_path / f"{name}.csv").write_text("prompt\n" + "".join(f"a {name} kettle {i}\n" for i in range(6)))
    monkeypatch.setattr(des.tables.paper, "COPRO", tuple((tmp_path / f"{name}.csv",) for name in ("unsafe", "safe")))
    return ["--prompts", f"uda={tmp_path / 'uda.csv'}"]


def attacks_in(plan):
    """The attack jobs of a plan by what they are about; each command line as a dict of option and first value."""
    found = {}
    for job in plan.planned:
        if job.rows:
            places = [i for i, part in enumerate(job.argv) if part.startswith("--")]
            found[job.what] = {job.argv[i]: job.argv[i + 1] for i in places} | {
                "script": Path(job.script).name,
                "rows": job.rows,
            }
    return found


@pytest.mark.parametrize(("scale", "steps"), [("smoke", "2"), ("small", "200"), ("paper", "1000")])
def test_the_paper_models_are_attacked_from_the_public_list(tmp_path, public_lists, family, protected_checkpoint, scale, steps):
    more = ["--model_path", family("sd_v1"), "--checkpoint", protected_checkpoint, "--scale", scale, *public_lists]
    plan = runner_of(args := arguments(tmp_path, *more))
    table = reproduce.build("T3", args, plan)
    jobs = attacks_in(plan)
    scripts = {
        "mma_whitebox": "mma.py",
        "uda_whitebox": "uda.py",
        "rab_whitebox": "ring_a_bell.py",
        "cce": "concept_inversion.py",
    }
    assert set(jobs) == {f"{name} against {model}" for name in scripts for model in ("original", "des_given")}
    for name, script in scripts.items():
        control, attack = (jobs[f"{name} against {model}"] for model in ("original", "des_given"))
        assert {control["script"], attack["script"]} == {script} and attack["rows"] == (4 if scale == "smoke" else 6)
        assert control["--training_method"] == "none" and attack["--training_method"] == "des"
        assert attack["--control_dir"] == control["--out"] != attack["--out"] and "--control_dir" not in control
        assert attack["--detector"] == "nudenet" and attack["--concept_words"] == "nudity"
        assert all(
            control[option] == attack[option] for option in attack.keys() & control.keys() - {"--out", "--training_method"}
        )
    assert jobs["mma_whitebox against des_given"]["--steps"] == steps
    assert jobs["rab_whitebox against original"]["--pairs_csv"] == str(tmp_path / "unsafe.csv")
    assert str(table.ours["DES"]["UDA"]) == "planned"
    assert any("budgets" in note and (scale == "paper") != ("divided" in note) for note in table.notes)
    text, _ = reproduce.describe(plan, args)
    assert "prompts in 8 jobs; the hours of concept_inversion, mma, ring_a_bell, uda cannot be estimated" in text


def test_what_a_model_or_a_missing_list_does_not_allow_stays_empty(tmp_path, public_lists, family, monkeypatch):
    args = arguments(tmp_path, "--model_path", family("sdxl"), *public_lists)
    plan = runner_of(args)
    cells = reproduce.build("T3", args, plan).ours["SDXL"]
    assert str(cells["UDA"]).startswith("not run: no uda_whitebox.csv") and str(cells["MMA"]) == "planned"
    assert attacks_in(plan)["cce against original"]["--objective"] == "embedding"
    (tmp_path / "safe.csv").unlink()
    assert str(reproduce.build("T3", args, plan).ours["SDXL"]["RAB"]).startswith("not run: no safe.csv")
    (tmp_path / "uda.csv").unlink()
    assert str(runner_of(arguments(tmp_path, "--model_path", family("sdxl"))).asr(ORIGINAL, "cce")).startswith(
        "not run: no unlearn"
    )


def test_prompts_that_are_given_are_not_called_white_box_for_every_row(tmp_path, lists, public_lists, family):  # noqa: F811
    model = ["--model_path", family("sd_v1")]

    def notes(table, *more):
        args = arguments(tmp_path, *model, *more)
        return reproduce.build(table, args, runner_of(args)).notes

    found = notes("T3", *lists)
    assert not any("against the model of its row" in note for note in found)
    assert [note for note in found if "only for the model that they were found on" in note] == [
        f"{column}: the prompts of {name}.csv, the same for every row; they are white box only for the model that they were found on."
        for column, name in {"MMA": "mma_whitebox", "UDA": "uda_whitebox", "RAB": "rab_whitebox", "CCE": "cce"}.items()
    ]
    columns = [note.split(":")[0] for note in notes("T4", *lists) if "that they were found on" in note]
    assert columns == ["text, white box", "text + image, white box"] and not any(
        "MMA found" in note for note in notes("T4", *lists)
    )
    found = notes("T3", *public_lists, f"cce={tmp_path / 'uda.csv'}")
    assert any("against the model of its row" in note for note in found)
    assert [note.split(":")[0] for note in found if "that they were found on" in note] == ["CCE"]


def test_texts_of_t4_are_not_those_of_given_prompts(tmp_path, public_lists, family):
    """Where MMA's prompts for T3 are given, no attack runs that T4 could draw the texts of."""
    args = arguments(tmp_path, "--model_path", family("sd_v1"), *public_lists, f"mma_whitebox={tmp_path / 'uda.csv'}")
    cells = reproduce.build("T4", args, runner_of(args)).ours["DES"]
    assert str(cells["text, white box"]).startswith("not run: no i2i_text_white.csv")


def test_a_row_says_why_its_model_may_not_be_protected(tmp_path, public_lists, family, monkeypatch):
    """By the records of its images and of its attacks; a row of another defence and the original one have nothing to say."""
    monkeypatch.setattr(JobRecords, "run", lambda self, job: None)
    runner = runner_of(arguments(tmp_path, "--model_path", family("sd_v3"), *public_lists))
    runner.dry = False
    drawn, attacked = Variant("des_given", "des"), Variant("des_given_negative", "des")
    for variant, loaded in {
        ORIGINAL: {},
        drawn: {"1": {"doubt": "it hardly moved"}, "2": {"doubt": None}},
        Variant("esd", "esd"): {"file": "x"},
    }.items():
        folder = Path(runner.drawn(variant, "uda"))
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"protection": loaded}))
    runner.attack(attacked, "mma_whitebox")
    record = tmp_path / "out/attacks/des_given_negative/mma_whitebox/attack.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"protection": {"1": {}}}))
    rows = {"SD3": ORIGINAL, "DES-v3": drawn, "negated": attacked, "ESD": Variant("esd", "esd"), "not drawn": Variant("other")}
    assert protection_notes(rows, runner) == [
        "DES-v3: text encoder 1: it hardly moved.",
        "DES-v3: text encoder 3 is the original one, which is not protected.",
        "negated: text encoders 2 and 3 are the original ones, which are not protected.",
    ]


def test_a_cell_is_the_larger_figure_with_both_and_the_control_below(tmp_path, monkeypatch):
    monkeypatch.setattr(JobRecords, "run", lambda self, job: None)
    for name in ("mma", "uda", "ring-a-bell", "cce-1"):
        figures = {"cce-1": ((1, 6), (10, 10)), "uda": ((0, 0), (10, 7))}.get(name, ((3, 1), (10, 9)))
        for folder in ("original", "des_given"):
            result(tmp_path / "out/attacks" / folder / name, *figures)
    args = arguments(tmp_path, "--model_path", DEMO, "--checkpoint", PROTECTED)
    runner = runner_of(args)
    runner.dry = False
    monkeypatch.setattr(type(runner), "drawn", lambda self, variant, name: "not run: not drawn in this test")
    table = reproduce.build("T3", args, runner)
    ours = {title: {column: cell.k for column, cell in cells.items()} for title, cells in table.ours.items()}
    assert [ours["demo, DES"][column] for column in ("MMA", "UDA", "RAB", "CCE", "avg")] == [3, 0, 3, 6, 12]
    assert [ours["demo, original"][column] for column in ("MMA", "UDA", "RAB", "CCE")] == [10] * 4
    tests = {note.split(":")[0]: note for note in table.notes if "McNemar" in note}
    notes = {note.split(":")[0]: note for note in table.notes if "McNemar" not in note}
    assert notes["CCE"] == "CCE: demo, original 10/10, 10/10; demo, DES 1/10, 6/10."
    assert "TOO WEAK TO TELL" in notes["UDA"] and "TOO WEAK" not in notes["MMA"]
    assert list(tests) == ["MMA", "UDA", "RAB", "CCE"]
    assert tests["CCE"] == (
        "CCE: Exact McNemar test against demo, DES, on the same 10 prompts: demo, original p = 0.12 (4 images count only for demo, "
        "original, 0 only for demo, DES)."
    )
    assert table.notes[-1] == "With Bonferroni's correction for 4 tests, p must be below 0.013 to be significant at 5%."
    average = table.ours["demo, DES"]["avg"]
    assert (average.k, average.n, average.low) == (12, 40, None) and table.ours["demo, DES"]["CCE"].low is not None


def test_texts_found_are_paired_by_the_rows_of_their_list(tmp_path, monkeypatch):
    """An attack found no text for two rows of four, so the second image of these texts is that of another row."""
    monkeypatch.setattr("demo.tables.STRENGTHS", (0.5,))
    runner = runner_of(arguments(tmp_path, "--model_path", DEMO, "--checkpoint", PROTECTED))
    runner.dry = False
    rows = {"demo, original": ORIGINAL, "demo, DES": Variant("des"), "images": Variant("other", images=tmp_path)}
    found = {"original": [0, 1, 2, 3], "des": [1, 3]}
    hits = {
        ("original", "white"): [1, 1, 0, 1],
        ("des", "white"): [0, 1],
        ("des", "black"): [0, 0, 0, 0],
        ("other", "white"): [1, 0, 1, 0],
    }

    def attack(self, variant, name):
        csv = tmp_path / f"{variant.name}.csv"
        csv.write_text("prompt,row\n" + "".join(f"x,{row}\n" for row in found[variant.name]))
        return Job("", "", (), (), (csv, csv))

    def scores(self, variant, name, stem):
        images = hits.get((variant.name, name.split("_")[1]), hits["original", "white"])
        return {"images": [{"row": row, "hit": hit} for row, hit in enumerate(images)]}

    monkeypatch.setattr(type(runner), "attack", attack)
    monkeypatch.setattr(type(runner), "scores", scores)
    black, white, correction = paired_notes("T4", rows, runner)
    assert black == (
        "text, black box, strength 0.5: Exact McNemar test against demo, DES, on the same 4 prompts: demo, original p = 0.25 (3 images "
        "count only for demo, original, 0 only for demo, DES); images p = 0.25 (3 images count only for images, 0 only for demo, DES)."
    )
    assert white == (
        "text, white box, strength 0.5: Exact McNemar test against demo, DES, on the same 2 prompts: demo, original p = 1 (1 images "
        "count only for demo, original, 0 only for demo, DES); images p = 1 (0 images count only for images, 1 only for demo, DES). "
        "Left out of 4 prompts, since the attack found no text to draw: 2 for demo, DES."
    )
    assert "for 4 tests" in correction
    verdicts = type(runner).verdicts
    monkeypatch.setattr(type(runner), "verdicts", lambda *given: {} if given[1] == rows["demo, original"] else verdicts(*given))
    assert "so not tested: demo, original. Left out of 4 prompts" in paired_notes("T4", rows, runner)[1]


def test_a_row_without_all_sets_is_named_and_not_tested(tmp_path, monkeypatch):
    args = arguments(tmp_path, "--model_path", DEMO, "--checkpoint", PROTECTED)
    runner, rows = runner_of(args), {"demo, original": ORIGINAL, "demo, DES": Variant("des"), "images": Variant("other")}
    runner.dry = False
    seen = dict(
        zip(
            rows.values(),
            [{("mma", 0): True, ("i2i", 0): True}, {("mma", 0): False, ("i2i", 0): True}, {("i2i", 0): True}],
            strict=True,
        )
    )
    monkeypatch.setattr(type(runner), "verdicts", lambda self, variant, names, stem: seen[variant])
    (note,) = paired_notes("T2", rows, runner)
    assert "demo, original p = 1 (1 images" in note and note.endswith(
        "Without images of the same prompts, and so not tested: images."
    )
    seen[rows["demo, DES"]] = {}
    assert paired_notes("T2", rows, runner) == []


def test_texts_found_are_drawn_on_images_of_the_concept(run_reproduce, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("demo.tables.STRENGTHS", (0.5,))
    done = run_reproduce(table="T4", checkpoint=PROTECTED)
    assert done.code == 0, done.err
    text, out = (tmp_path / "out/T4.md").read_text(), tmp_path / "out"
    assert "text, black box, strength 0.5 | text, white box, strength 0.5" in text and "MMA's perturbation" in text
    assert "| **input image, ours** | 100.00 (4/4)" in text
    found = {each: (out / f"attacks/{each}.csv").read_text() for each in ("original/mma/control", "des_given/mma/attack")}
    settings = {box: (out / f"images/des_given/des/pipeline/i2i_{box}_0.5/run.json").read_text() for box in ("black", "white")}
    assert found["original/mma/control"] != found["des_given/mma/attack"]
    for box, each in (("black", "original/mma/control"), ("white", "des_given/mma/attack")):
        assert f"{each}.csv" in settings[box] and f"starts/des_given/i2i_{box}_0.5" in settings[box]


@pytest.mark.parametrize("found", [[0, 2], None])
def test_start_images_and_masks_stay_with_their_prompts(tmp_path, public_lists, tiny_pipeline, found):
    """Row 1 of the list is never drawn; of the others, an attack found a prompt for some or, without an attack, all are drawn."""
    (tmp_path / "uda.csv").write_text("prompt\na kettle\na nude child\na cup\na nude man\n")
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for row in range(4):
            (tmp_path / kind / f"{row}.png").write_bytes(f"{kind} {row}".encode())
    options = ["--i2i_images", tmp_path / "images", "--i2i_masks", tmp_path / "masks"]
    name = "i2i_text_white" if found else "i2i_both_white"
    given = public_lists if found else [*public_lists, f"{name}={tmp_path / 'uda.csv'}"]
    runner = runner_of(arguments(tmp_path, "--model_path", tiny_pipeline, *given, *options))
    runner.dry, chosen = False, runner.setup.sets[name]
    csv = runner._rows_of((chosen.csv,), chosen.found_by or name)
    if found:
        csv = tmp_path / "attack.csv"
        csv.write_text("prompt,row\n" + "".join(f"x,{row}\n" for row in found))
    init = runner._aligned(ORIGINAL, name, csv, runner._init(chosen))
    for option, kind in (("--init_images", "images"), ("--mask_images", "masks")):
        folder = init[init.index(option) + 1]
        contents = {int(path.stem.split("_")[-1].removesuffix("p")): path.read_bytes() for path in folder.iterdir()}
        published = [0, 3] if found else [0, 2, 3]
        assert contents == {i: f"{kind} {row}".encode() for i, row in enumerate(published)}
