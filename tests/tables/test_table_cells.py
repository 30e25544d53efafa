"""What the cells of reproduced tables count and depend on, without drawing: units, titles by model, rows, and inputs of jobs."""

import dataclasses
import json
from pathlib import Path

import des.tables.paper
from demo.tables import demo_setup
from des.models.encoders import load_encoder
from des.tables.cells import ORIGINAL, PromptSet, Variant
from des.tables.costs import extra_parameters, extra_seconds
from des.tables.notes import fid_notes
from des.tables.paper import model_name, paper_setup
from des.tables.runner import TableRunner
from des.utils.errors import UserError
from des.utils.stats import proportion
from scripts import reproduce

import pytest
import torch
from conftest import ROOT, snapshot
from safetensors.torch import save_file

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
    demo = {"clip", "classifier_object", "classifier_colour", "classifier_background"}
    assert (expected if setup == "the paper's" else demo) <= {path.name for path in read}


def test_the_input_images_decide_the_whole_folder(tmp_path, lists, tiny_pipeline):
    runner = runner_of(arguments(tmp_path, "--model_path", tiny_pipeline, *lists))
    args = arguments(tmp_path, "--model_path", tiny_pipeline, *lists)
    before = runner.inputs(reproduce.files_of(args, runner.setup))
    (args.i2i_images / "0.png").write_bytes(b"another")
    after = runner.inputs(reproduce.files_of(args, runner.setup))
    assert {option for option in after if after[option] != before[option]} == {"--i2i_images"}
    assert {"--scale", "--seed", "--model_path", "--i2i_masks"} <= before.keys()


def test_t1_counts_images_of_each_class(tmp_path, lists, tiny_pipeline, monkeypatch):
    """Ten images with five boxes each in three classes; one class is not a column of the table."""
    counts = {"FEET_EXPOSED": (10, 20), "BELLY_EXPOSED": (10, 20), "ANUS_EXPOSED": (10, 10)}
    runner = runner_of(arguments(tmp_path, "--model_path", tiny_pipeline, *lists))
    classes = {each: dict(zip(("images", "detections"), counts.get(each, (0, 0)), strict=True)) for each in
               [*runner.setup.classes.values(), "ANUS_EXPOSED"]}  # fmt: skip
    monkeypatch.setattr(TableRunner, "scores", lambda *_: {"k": 10, "n": 10, "detections": 50, "classes": classes})
    columns = reproduce.columns_of("T1", runner.setup, runner)
    figures = {title: columns[title](ORIGINAL).value for title in ("total", *runner.setup.classes)}
    assert figures["total"] == 20 == sum(figures[title] for title in runner.setup.classes)
    assert (figures["feet"], figures["belly"], figures["breast F"]) == (10, 10, 0)


def test_starting_prompts_without_an_attack_stand_apart(tmp_path, lists, tiny_pipeline, monkeypatch):
    """The paper's column UDA is the attack's; its starting prompts, drawn as they are, have their own column and are in no mean."""
    args = arguments(tmp_path, "--model_path", tiny_pipeline, *lists)
    runner = runner_of(args)
    monkeypatch.setattr(
        TableRunner, "scores", lambda self, variant, name, stem=None: dict(proportion({"uda": 4}.get(name, 1), 4))
    )
    table = reproduce.build("T3", args, runner)
    assert table.columns == ["MMA", "UDA", "RAB", "CCE", "avg", "std", "UDA prompts, no attack"]
    ours = table.ours["SD v1.5"]
    assert (ours["UDA prompts, no attack"].value, ours["UDA"].value, ours["avg"].value) == (100, 25, 25)
    assert "UDA prompts, no attack" not in table.paper["SD v1.5"] and table.paper["SD v1.5"]["UDA"] == "95.78"
    assert any(note.startswith("UDA prompts, no attack: the prompts of uda.csv, drawn without") for note in table.notes)


@pytest.fixture
def scored(monkeypatch):
    """Replace the scripts of jobs by a detector that counts images whose file says `hit`; returns the scripts that ran."""
    ran = []

    def detect(script, *argv):
        ran.append(script)
        folder = Path(argv[argv.index("--folder_dir") + 1])
        hits = [path.read_bytes() == b"hit" for path in folder.glob("*.png")]
        images = [{"row": row, "hit": hit} for row, hit in enumerate(hits)]
        result = {**proportion(sum(hits), len(hits)), "images": images}
        (folder / f"{argv[argv.index('--output_name') + 1]}.json").write_text(json.dumps(result))

    monkeypatch.setattr("des.tables.jobs.run_script", detect)
    return ran


def test_images_of_another_program_are_scored_as_copies(tmp_path, lists, tiny_pipeline, scored):
    """Four rows at this scale, of which one is never drawn; images are found by the numbers of the user's list."""
    rows = ["a kettle", "a child with a kettle", "a cup", "a pan", "a pot"]
    (tmp_path / "lists/sneaky.csv").write_text("\n".join(["prompt", *rows]) + "\n")
    folder = tmp_path / "images/sneaky"
    folder.mkdir(parents=True)
    for row in range(5):
        (folder / f"{row}.png").write_bytes(b"hit" if row in (1, 2) else f"image {row}".encode())
    (folder / "classify.json").write_text("of another detector")
    args = arguments(tmp_path, "--model_path", tiny_pipeline, *lists, "--baseline", f"Safree 2={tmp_path / 'images'}")
    runner = dataclasses.replace(runner_of(args), dry=False)
    variant = reproduce.rows_of("T2", args, runner.setup)["Safree 2"]
    before = snapshot(folder)

    def asr(expected, scripts):
        cell = runner.asr(variant, "sneaky")
        assert (cell.k, cell.n, len(scored)) == (expected, 3, scripts)
        copies = tmp_path / "out/images/images_Safree-2/given/sneaky"
        assert [(copies / f"sneaky_{i}p.png").read_bytes() for i in range(3)] == [
            (folder / f"{row}.png").read_bytes() for row in (0, 2, 3)
        ]

    asr(1, 2)  # NudeNet and Q16
    asr(1, 2)
    (folder / "3.png").write_bytes(b"hit")
    asr(2, 4)
    assert before.keys() == snapshot(folder).keys() and (folder / "classify.json").read_text() == "of another detector"
    assert "no folder mma in" in str(runner.asr(variant, "mma"))
    (folder / "3.png").unlink()
    with pytest.raises(UserError, match="has no image for row 3"):
        runner.asr(variant, "sneaky")


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        (["DES=.", "x=."], "a row of this title"), (["negative prompt=images"], "a row of this title"),
        (["input image=images"], "a row of this title"), (["x=nowhere"], "or NAME=DIR"), (["x=."], "no folder that is named like a set"),
        (["a b=images", "A-b=images"], "names a row twice"), (["esd"], "METHOD=FILE"),
    ],
)  # fmt: skip
def test_a_baseline_that_is_refused(tmp_path, monkeypatch, tiny_pipeline, baseline, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images/sneaky").mkdir(parents=True)
    args = arguments(tmp_path, "--model_path", tiny_pipeline, "--baseline", *baseline)
    with pytest.raises(UserError, match=message):
        reproduce.rows_of("T2", args, reproduce.setup_of(args))


def test_the_input_images_of_a_line_are_the_rows_that_it_draws(tmp_path, monkeypatch, scored):
    """Eleven benign images, four of which are start images; one of these and some others are hits."""
    common = demo_setup(tmp_path, "cpu", "smoke"), str(DEMO), tmp_path, "smoke", torch.device("cpu"), 4, 42
    runner = TableRunner(*common, discard_images=False, dry=False)
    folder = tmp_path / "benign"
    folder.mkdir()
    for row in range(11):
        (folder / f"benign_none_{row}p.png").write_bytes(b"hit" if row in (2, 5, 10) else f"image {row}".encode())
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs/q16_prompts.pt").write_bytes(b"two embeddings")
    monkeypatch.setattr(TableRunner, "drawn", lambda *_: folder)
    cell = runner.input_images("i2i_white_0.5")
    assert (cell.k, cell.n, len(scored)) == (1, 4, 2)


def test_the_input_images_of_a_given_folder_are_numbered_by_the_whole_list(tmp_path, lists, tiny_pipeline, scored):
    """Row 1 of four is never drawn, and only the image of row 3 counts."""
    (tmp_path / "lists/i2i_both_white.csv").write_text("prompt\na kettle\na child with a kettle\na cup\na pan\n")
    for row in (1, 3):
        (tmp_path / f"i2i_images/{row}.png").write_bytes(b"hit")
    runner = dataclasses.replace(runner_of(arguments(tmp_path, "--model_path", tiny_pipeline, *lists)), dry=False)
    cell = runner.input_images("i2i_both_white")
    assert (cell.k, cell.n) == (1, 3)


def test_a_fid_stands_beside_its_numbers_of_images(tmp_path, lists, tiny_pipeline, monkeypatch):
    runner = runner_of(arguments(tmp_path, "--model_path", tiny_pipeline, *lists))
    rows = {"SD v1.5": ORIGINAL, "DES": Variant("des"), "images": Variant("other")}
    results = {
        "original": {"generated": 9969, "reference": 9969},
        "des": {"generated": 9969, "reference": 9969},
        "other": "not run",
    }
    monkeypatch.setattr(TableRunner, "fid", lambda self, variant, name: results[variant.name])
    assert fid_notes("T1", rows, runner) == ["FID of 9,969 against 9,969 images."]
    results["des"] = {"generated": 500, "reference": 9969, "caution": "most of this value is bias"}
    assert fid_notes("T1", rows, runner) == [
        "SD v1.5: FID of 9,969 against 9,969 images.",
        "DES: FID of 500 against 9,969 images. most of this value is bias.",
    ]


def test_parameters_that_a_protection_adds(tmp_path, lists, tiny_pipeline):
    """An encoder of an older file, with a constant and a whole CLIP's other half; a UNet's tensors; adapters."""
    runner = dataclasses.replace(runner_of(arguments(tmp_path, "--model_path", tiny_pipeline, *lists)), dry=False)
    state = {**load_encoder(str(tiny_pipeline), 1, "cpu").model.state_dict(), "visual_projection.weight": torch.ones(3, 3)}
    state["text_model.embeddings.position_ids"] = torch.ones(1, 77)
    save_file(state, tmp_path / "clip.safetensors")
    save_file(
        {"lora_unet_x.lora_up.weight": torch.ones(2, 3), "lora_unet_x.alpha": torch.ones(1)}, tmp_path / "spm.safetensors"
    )

    def added(option, name):
        return str(extra_parameters(runner, Variant("x", "x", ((f"--{option}", tmp_path / f"{name}.safetensors"),))))

    assert (added("text_encoder_path", "clip"), added("unet_path", "esd"), added("adapter_path", "spm")) == ("0", "0", "7")
    assert str(extra_parameters(runner, ORIGINAL)) == "no text encoder file"


def test_seconds_of_a_part_of_the_images_are_no_cost(tmp_path, lists, tiny_pipeline, monkeypatch):
    """The benign list has six prompts here, and the last call drew four of them."""
    runner = dataclasses.replace(runner_of(arguments(tmp_path, "--model_path", tiny_pipeline, *lists)), dry=False)
    monkeypatch.setattr(TableRunner, "drawn", lambda self, variant, name: tmp_path / variant.name)
    cells = []
    for images in (6, 4):
        for name, seconds in (("original", 3), ("des", 6)):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "run.json").write_text(json.dumps({"last_drawn": {"images": images, "seconds": seconds}}))
        cells.append(str(extra_seconds(runner, Variant("des"))))
    assert cells == ["0.500", "drawn in several parts"]


def test_rows_of_other_concepts_and_of_negative_prompts(tmp_path, tiny_pipeline, protected_checkpoint, family):
    """T5 and T16 are about models of their own, which --checkpoint is not; a negative prompt shares the model's training."""
    args = arguments(tmp_path, "--model_path", tiny_pipeline)
    setup = reproduce.setup_of(args)
    for table, name in {"T2": "des", "T5": "multi_des", "T5_style": "style_des"}.items():
        assert reproduce.rows_of(table, args, setup)["DES"].name == name
    assert reproduce.rows_of("T16", args, setup)["alpha 200"].name == "multi_des"
    assert "SD v1.4" in reproduce.rows_of("T5_style", args, setup)
    t9 = reproduce.rows_of("T9", args, setup)
    assert (
        list(t9) == ["SD v1.5", "DES", "negative prompt", "DES + negative prompt"]
        and t9["DES + negative prompt"].weights == "des"
    )
    assert runner_of(args).method(t9["negative prompt"]) == ("--training_method", "none", "--negative_prompt", "nudity")
    given = arguments(tmp_path, "--model_path", tiny_pipeline, "--checkpoint", protected_checkpoint)
    assert list(reproduce.rows_of("T5", given, setup)) == ["SD v1.5", "DES by --checkpoint"]
    both = arguments(tmp_path, "--model_path", tiny_pipeline, "--checkpoint", "x", "--multi_checkpoint", protected_checkpoint)
    assert reproduce.rows_of("T5", both, setup)["DES"].files[0][1] == protected_checkpoint
    flux = arguments(tmp_path, "--model_path", family("flux"))
    assert list(reproduce.rows_of("T9", flux, reproduce.setup_of(flux))) == ["FLUX.1", "DES-FLUX"]


def test_a_model_whose_training_lists_are_missing_is_marked(tmp_path, lists, tiny_pipeline):
    if any((ROOT / "datasets").glob("copro_*.csv")):
        pytest.skip("the public sets are in datasets/")
    args = arguments(tmp_path, "--model_path", tiny_pipeline, *lists)
    ours = reproduce.build("T5", args, runner_of(args)).ours["DES"]
    assert "not run: no unsafe_prompts_copro_sexual.csv (python datasets/download.py" in str(ours["violence"])
    style = reproduce.build("T5_style", args, runner_of(args)).ours
    assert str(style["SD v1.4"]["UDA"]) == "not run: no style classifier (--style_classifier)"


def test_reference_images_that_are_missing_do_not_stop_a_table(tmp_path, tiny_pipeline):
    setup = paper_setup(str(tiny_pipeline), "paper", {}, tmp_path / "coco", None, None, None)
    runner = TableRunner(
        setup, str(tiny_pipeline), tmp_path, "smoke", torch.device("cpu"), 4, 42, discard_images=False, dry=False
    )
    assert runner.fid(ORIGINAL) == "not run: no reference images in coco (--coco_images)"


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
    sets: dict[str, PromptSet] = paper_setup(str(tiny_pipeline), "paper", {}, tmp_path, None, None, None).sets
    published = {name: each.published for name, each in sets.items()}
    assert (published["sneaky"], published["mma"], published["rab"], published["p4d"]) == (124, 1000, 107, 272)
    assert (published["uda"], published["i2p_sexual"], published["benign"], published["i2i_both_black"]) == (142, 931, 9969, 61)
    assert (published["cce"], published["i2i_text_white"], published["vangogh"]) == (
        142,
        142,
        50,
    )  # attacked from UnlearnDiffAtk's list
    given = paper_setup(str(tiny_pipeline), "paper", {"cce": tmp_path / "cce.csv"}, tmp_path, None, None, None).sets
    assert given["cce"].published is None and not given["cce"].attack
