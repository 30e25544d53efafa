"""What the cells of reproduced tables count and depend on, without drawing: units, titles by model, rows, and inputs of jobs."""

import json
from pathlib import Path

import des.tables.paper
from demo.tables import demo_setup
from des.tables.build import Cell
from des.tables.cells import ORIGINAL, PromptSet
from des.tables.paper import model_name, paper_setup
from des.tables.runner import TableRunner
from des.utils.errors import UserError
from des.utils.stats import proportion
from scripts import reproduce

import pytest
import torch
from conftest import ROOT

DEMO = ROOT / "demo/models/pipeline"


def arguments(tmp_path, *given):
    return reproduce.parse_args(
        ["--table", "all", "--device", "cpu", "--scale", "smoke", "--out", str(tmp_path / "out"), *map(str, given)]
    )


def runner_of(args):
    setup = reproduce.setup_of(args)
    return TableRunner(setup, args.model_path, args.out, args.scale, args.device, 4, 42, discard_images=False, dry=True)


@pytest.fixture
def lists(tmp_path, monkeypatch):
    """Write a list of six harmless prompts and images for every set of the paper; returns the options that name them."""
    sets = {**des.tables.paper.FILES, **{name: name for name in des.tables.paper.ATTACKED}}
    given = []
    for name in sets:
        path = tmp_path / f"lists/{name}.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("prompt\n" + "".join(f"a {name} kettle {i}\n" for i in range(6)))
        given.append(f"{name}={path}")
    options = ["--prompts", *given]
    for option in ("coco_images", "i2i_images", "i2i_masks"):
        folder = tmp_path / option
        folder.mkdir()
        for row in range(6):
            (folder / f"{row}.png").write_bytes(f"{option} {row}".encode())
        options += [f"--{option}", folder]
    (tmp_path / "q16.pt").write_bytes(b"two embeddings")
    return [*options, "--q16_prompts", tmp_path / "q16.pt"]


@pytest.mark.parametrize("setup", ["the paper's", "the demo's"])
def test_whatever_a_job_reads_is_among_its_inputs(tmp_path, lists, tiny_pipeline, protected_checkpoint, setup):
    """All files and folders on a command line, except the model (which belongs to the whole folder) and outputs of jobs."""
    given = (
        ["--model_path", tiny_pipeline, "--checkpoint", protected_checkpoint, *lists]
        if setup == "the paper's"
        else ["--model_path", DEMO]
    )
    args = arguments(tmp_path, *given)
    plan = runner_of(args)
    for name in ("T1", "T2", "T3", "T4", "T6", "T10"):
        reproduce.build(name, args, plan)
    assert len(plan.planned) > 20
    read = set()
    for job in plan.planned:
        named = {Path(part) for part in job.argv if "/" in part and Path(part).exists()} - {Path(args.model_path)}
        assert named <= set(job.inputs), job.what
        read |= named
    expected = {"q16.pt", "coco_images", "i2i_images", "i2i_masks", protected_checkpoint.name}
    demo = {"clip", "classifier_object", "classifier_colour", "classifier_background", "demo_synonyms.csv"}
    assert (expected if setup == "the paper's" else demo) <= {path.name for path in read}


def test_the_input_images_decide_the_whole_folder(tmp_path, lists, tiny_pipeline):
    runner = runner_of(arguments(tmp_path, "--model_path", tiny_pipeline, *lists))
    args = arguments(tmp_path, "--model_path", tiny_pipeline, *lists)
    before = runner.inputs(reproduce.files_of(args))
    (args.i2i_images / "0.png").write_bytes(b"another")
    after = runner.inputs(reproduce.files_of(args))
    assert {option for option in after if after[option] != before[option]} == {"--i2i_images"}
    assert {"--scale", "--seed", "--model_path", "--i2i_masks"} <= before.keys()


def test_t1_counts_images_of_each_class(tmp_path, lists, tiny_pipeline, monkeypatch):
    """Ten images with five boxes each in three classes; one class is not a column of the table."""
    counts = {"FEET_EXPOSED": (10, 20), "BELLY_EXPOSED": (10, 20), "ANUS_EXPOSED": (10, 10)}
    runner = runner_of(arguments(tmp_path, "--model_path", tiny_pipeline, *lists))
    classes = {each: dict(zip(("images", "detections"), counts.get(each, (0, 0)), strict=True)) for each in
               [*runner.setup.classes.values(), "ANUS_EXPOSED"]}  # fmt: skip
    monkeypatch.setattr(TableRunner, "_scores", lambda *_: {"k": 10, "n": 10, "detections": 50, "classes": classes})
    columns = reproduce.columns_of("T1", runner.setup, runner)
    figures = {title: columns[title](ORIGINAL).value for title in ("total", *runner.setup.classes)}
    assert figures["total"] == 20 == sum(figures[title] for title in runner.setup.classes)
    assert (figures["feet"], figures["belly"], figures["breast F"]) == (10, 10, 0)


def test_starting_prompts_without_an_attack_stand_apart(tmp_path, lists, tiny_pipeline, monkeypatch):
    """The paper's column UDA is the attack's; its starting prompts, drawn as they are, have their own column and are in no mean."""
    (tmp_path / "lists/uda_whitebox.csv").unlink()
    given = [part for part in lists if not str(part).startswith("uda_whitebox")]
    args = arguments(tmp_path, "--model_path", tiny_pipeline, *given)
    runner = runner_of(args)
    monkeypatch.setattr(
        TableRunner, "drawn", lambda self, variant, name: ROOT if self.setup.sets[name].csv.is_file() else f"not run: no {name}"
    )
    monkeypatch.setattr(TableRunner, "_scores", lambda self, variant, name, stem: (
        dict(proportion({"uda": 4}.get(name, 1), 4)) if isinstance(self.drawn(variant, name), Path) else self.drawn(variant, name)))  # fmt: skip
    table = reproduce.build("T3", args, runner)
    assert table.columns == ["MMA", "UDA", "RAB", "CCE", "avg", "std", "UDA prompts, no attack"]
    ours = table.ours["SD v1.5"]
    assert ours["UDA"].value is None and ours["avg"].value is None and "uda_whitebox" in str(ours["avg"])
    assert (ours["UDA prompts, no attack"].value, ours["MMA"].value) == (100, 25)
    assert "UDA prompts, no attack" not in table.paper["SD v1.5"] and table.paper["SD v1.5"]["UDA"] == "95.78"
    assert any(note.startswith("UDA prompts, no attack: uda.csv drawn as it is") for note in table.notes)


def test_the_input_images_of_a_line_are_the_rows_that_it_draws(tmp_path, monkeypatch):
    """Eleven benign images, four of which are start images; one of these and some others are hits."""
    runner = TableRunner(
        demo_setup(tmp_path, "cpu"), str(DEMO), tmp_path, "smoke", torch.device("cpu"), 4, 42, discard_images=False, dry=True
    )
    folder = Path(runner.drawn(ORIGINAL, "benign"))
    folder.mkdir(parents=True)
    names = [f"benign_none_{row}p.png" for row in range(11)]
    for name in names:
        (folder / name).write_bytes(name.encode())
    images = [{"file": name, "row": row, "hit": row in (2, 5, 10)} for row, name in enumerate(names)]
    monkeypatch.setattr(TableRunner, "_scores", lambda *_: {"k": 3, "n": 11, "images": images})
    cell = runner.input_images("i2i_text")
    assert (cell.k, cell.n) == (1, 4)


def test_reference_images_that_are_missing_do_not_stop_a_table(tmp_path, tiny_pipeline):
    setup = paper_setup(str(tiny_pipeline), {}, tmp_path / "coco", None, None, None)
    runner = TableRunner(
        setup, str(tiny_pipeline), tmp_path, "smoke", torch.device("cpu"), 4, 42, discard_images=False, dry=False
    )
    assert runner.fid(ORIGINAL) == Cell(missing="not run: no reference images in coco (--coco_images)")


def test_a_family_without_a_table_is_refused(family):
    with pytest.raises(UserError, match="is of the family chroma, for which the paper has no table"):
        model_name(str(family("chroma")))


@pytest.mark.parametrize(
    ("kind", "part", "change", "name"),
    [
        ("sd_v1", None, {}, "SD v1.5"),
        ("sd_v2", None, {}, "SD v2"),
        ("sdxl", None, {}, "SDXL"),
        ("sd_v3", None, {}, "SD3"),
        ("sd_v3", "transformer", {"qk_norm": "rms_norm"}, "SD3.5"),
        ("flux", None, {}, "FLUX.1"),
        ("flux", "transformer", {"guidance_embeds": False}, "FLUX.1 schnell"),
    ],
)
def test_rows_are_titled_by_model(tmp_path, family, kind, part, change, name):
    """Our rows stand beside the paper's rows of the same model, which is recognised by its configuration and not by its path."""
    source, folder = family(kind), tmp_path / "stable-diffusion-v1-5"
    for path in source.rglob("*.json"):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    if part:
        config = folder / part / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert model_name(str(folder)) == name
    args = arguments(tmp_path, "--model_path", folder)
    runner = runner_of(args)
    for table in ("T2", "T15", "T17"):
        built = reproduce.build(table, args, runner)
        beside = set(built.ours) & set(built.paper)
        mine = {"SD v1.5": {"SD v1.5", "DES"}, "FLUX.1": {"FLUX.1", "DES-FLUX"}}.get(name, set())
        assert beside == (mine if table == "T2" else set(built.paper) if name == "SD v1.5" else set()), (table, beside)
    assert len(reproduce.build("T7", args, runner).ours.keys() & reproduce.build("T7", args, runner).paper.keys()) == (
        2 if name in ("SDXL", "SD3", "SD3.5", "FLUX.1") else 0
    )


def test_published_counts_are_those_of_the_public_lists(tiny_pipeline, tmp_path):
    sets: dict[str, PromptSet] = paper_setup(str(tiny_pipeline), {}, tmp_path, None, None, None).sets
    published = {name: each.published for name, each in sets.items()}
    assert (published["sneaky"], published["mma"], published["rab"], published["p4d"]) == (124, 1000, 107, 272)
    assert (published["uda"], published["i2p_sexual"], published["benign"], published["i2i_both_black"]) == (142, 931, 9969, 61)
    assert [name for name, count in published.items() if count is None] == ["cce"]
