"""What a command line may not write over: folders, files where a folder goes, inputs, and files of another name."""

import argparse
import json
import random

from demo.world import KINDS, random_scene, render
from des.evaluation.detectors.options import result_name
from des.models.checkpoints import save_checkpoint
from des.utils import cli
from des.utils.errors import UserError
from des.utils.files import is_reserved, replacing, result_paths, write_text

import pytest
import torch
from conftest import GOLDEN, ROOT, SCRIPTS, flags, snapshot, training_line
from safetensors.torch import load_file
from transformers import CLIPTextModel

SMALL = ROOT / "demo/models/classifier_object"
FILES = {
    "fid.py": ["output_file", "save_stats"],
    "train_des.py": ["safe_embedding_path"],
    "scripts/report.py": ["out"],
    "scripts/benchmarks/speed.py": ["out"],
    "scripts/benchmarks/detector.py": ["out"],
    "scripts/benchmarks/faults.py": ["out"],
    "scripts/benchmarks/rounding.py": ["out"],
    "datasets/nearest_prompts.py": ["out"],
}
FOLDERS = {
    "train_des.py": ["output_dir"],
    "save_codebook.py": ["save_dir"],
    "generate.py": ["results_dir"],
    "scripts/export.py": ["out"],
    "scripts/reproduce.py": ["out"],
    "scripts/download_checkpoint.py": ["dir"],
    "datasets/download.py": ["dir"],
    "datasets/style_prompts.py": ["dir"],
    "demo/table_inputs.py": ["out"],
    "demo/gates.py": ["out"],
    "demo/train.py": ["out", "work_dir"],
    "demo/experiment.py": ["out"],
    "demo/baselines.py": ["out"],
    "scripts/benchmarks/first_check.py": ["out"],
    **{f"scripts/attacks/{path.name}": ["out", "control_dir"] for path in (ROOT / "scripts/attacks").glob("*.py")},
    **{
        key: ["output_dir"]
        for key in ("fid.py", "clipscore.py", "tasks/img_batch_classify.py", "tasks/img_batch_classify_q16.py")
    },
}
READ = {
    "csv_path", "folder_dir", "prompts_file", "detector_weights", "gen_imgs_path", "coco_imgs_path", "ref_stats", "prompt_path",
    "image_folder", "csv_file", "run_dirs", "folder", "base_checkpoint", "prompts_csv", "scores", "checkpoint", "candidates",
    "codebook_dir", "unsafe_csv_path", "safe_csv_path", "init_images", "mask_images", "unet_path", "adapter_path", "coco_images",
    "q16_prompts", "i2i_images", "i2i_masks", "contents", "convert", "text_encoder_path", "text_encoder_2_path",
    "text_encoder_3_path", "original_imgs_path", "multi_checkpoint", "style_checkpoint", "style_classifier", "benign_csv", "learned_tokens", "forbidden_tokens", "pairs_csv", "attacks",
}  # fmt: skip


class _Parser(BaseException):
    """Carries a script's parser out of the script."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_that_names_an_output_is_checked(call, monkeypatch, script):
    def stop(parser, argv=None):
        raise _Parser(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(_Parser) as caught:
        call(script)
    options = {action.dest: action.type for action in caught.value.args[0]._actions if action.dest not in READ}
    (log,) = [options.pop("log_file", cli.output_file)]
    assert log is cli.output_file
    by_type = {kind: [name for name, each in options.items() if each is kind] for kind in (cli.output_file, cli.output_folder)}
    assert by_type == {cli.output_file: FILES.get(script, []), cli.output_folder: FOLDERS.get(script, [])}
    paths = [name for name, each in options.items() if getattr(each, "__name__", "") == "Path"]
    assert paths == [], "say in READ that the option is an input, or give it a type of des.utils.cli"


@pytest.mark.parametrize(("script", "option"), [(script, each) for script, options in FILES.items() for each in options])
def test_a_folder_is_no_output_file(call, tmp_path, script, option):
    (tmp_path / "folder/below").mkdir(parents=True)
    (tmp_path / "folder/below/work.txt").write_text("mine")
    before = snapshot(tmp_path)
    for path in (tmp_path / "folder", f"{tmp_path}/new/", tmp_path / "folder/below/work.txt/x"):
        done = call(script, f"--{option}", path)
        assert done.failed_in_one_sentence and option in done.err, done.err
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("script", "option"), [(script, each) for script, options in FOLDERS.items() for each in options])
def test_a_file_is_no_output_folder(call, tmp_path, script, option):
    (tmp_path / "work.txt").write_text("mine")
    for path in (tmp_path / "work.txt", tmp_path / "work.txt/below"):
        done = call(script, f"--{option}", path)
        assert done.failed_in_one_sentence and option in done.err, done.err
        assert snapshot(tmp_path) == {"work.txt": b"mine"}


@pytest.fixture
def images(tmp_path):
    """A folder of four renders, named by row, and their prompts beside it."""
    (tmp_path / "images").mkdir()
    rng = random.Random(5)
    for row in range(4):
        render(random_scene(rng, KINDS[row]), rng).save(tmp_path / f"images/t2i_none_{row}p.png")
    (tmp_path / "p.csv").write_text("prompt\n" + "".join(f"a {kind}\n" for kind in KINDS[:4]))
    return tmp_path / "images"


def inputs_as_outputs(tmp_path, images):
    """Command lines that would write over one of their own inputs."""
    csv, demo = tmp_path / "p.csv", ROOT / "demo/models"
    (images / "clipscore.csv").write_text(csv.read_text())
    (images / "classify.txt").write_text(csv.read_text())
    (tmp_path / "weights.pth").write_bytes(b"weights")
    (tmp_path / "x_safe.csv").write_text(csv.read_text())
    (tmp_path / "out/prompts").mkdir(parents=True)
    (tmp_path / "out/prompts/violence.csv").write_text(csv.read_text())
    wish = flags(
        job="pickscore", gen_imgs_path=images, device="cpu", model=demo / "clip", processor=demo / "clip", prompt_path=csv
    )
    fid = flags(gen_imgs_path=images, coco_imgs_path=images, device="cpu")
    return {
        "its table": ("fid.py", *wish, "--output_file", tmp_path / "p.txt"),
        "by name": ("fid.py", *wish, "--output_file", csv),
        "weights": ("fid.py", *fid, "--feature_extractor", tmp_path / "weights.pth", "--save_stats", tmp_path / "weights.pth"),
        "twice": (
            "fid.py",
            *fid,
            "--feature_extractor",
            SMALL,
            "--output_file",
            tmp_path / "s",
            "--save_stats",
            tmp_path / "s",
        ),
        "clipscore": ("clipscore.py", *flags(image_folder=images, csv_file=images / "clipscore.csv", clip_model=demo / "clip")),
        "classify": (
            "tasks/img_batch_classify.py",
            *flags(folder_dir=images, csv_path=images / "classify.txt", classifier=SMALL, cls_class="ball", devices="cpu"),
        ),
        "targets": training_line(
            tmp_path, unsafe_csv_path=csv, safe_csv_path=csv, safe_embedding_path=csv, recompute_targets=[]
        ),
        "style": (
            "datasets/style_prompts.py",
            *flags(contents=tmp_path / "x_safe.csv", name="x", dir=tmp_path, count=2, test=1),
            "Ann",
        ),
        "table": (
            "scripts/reproduce.py",
            *flags(table="T6", out=tmp_path / "out", prompts=f"violence={tmp_path / 'out/prompts/violence.csv'}", dry_run=[]),
        ),
    }


@pytest.mark.parametrize(
    "case", ["its table", "by name", "weights", "twice", "clipscore", "classify", "targets", "style", "table"]
)
def test_an_input_is_no_output(call, tmp_path, images, case):
    line = inputs_as_outputs(tmp_path, images)[case]
    before = snapshot(tmp_path)
    done = call(*line)
    assert done.failed_in_one_sentence and "written" in done.err, done.err
    assert snapshot(tmp_path) == before


@pytest.fixture
def fid(call, images):
    def run(output):
        line = flags(gen_imgs_path=images, coco_imgs_path=images, feature_extractor=SMALL, device="cpu", output_file=output)
        return call("fid.py", *line)

    return run


def test_what_follows_a_dot_is_part_of_a_results_name(fid, tmp_path):
    for name in ("scores/fid_lambda_0.3", "scores/fid_lambda_0.6"):
        assert fid(tmp_path / name).code == 0
    names = {path.name for path in (tmp_path / "scores").iterdir()}
    assert names == {
        f"{dot}fid_lambda_{x}{end}" for x in ("0.3", "0.6") for dot, end in (("", ""), ("", ".json"), (".", ".lock"))
    }
    results = [json.loads((tmp_path / f"scores/fid_lambda_{x}.json").read_text()) for x in ("0.3", "0.6")]
    assert [each["made_by"]["arguments"]["output_file"][-3:] for each in results] == ["0.3", "0.6"]


@pytest.mark.parametrize("suffix", [".txt", ".json", ".csv", ".JSON"])
def test_the_files_of_a_result_have_different_names(fid, tmp_path, suffix):
    done = fid(tmp_path / f"result{suffix}")
    assert done.code == 0, done.err
    paths = result_paths(tmp_path / f"result{suffix}")
    assert len(set(paths)) == 3 and paths.json == tmp_path / "result.json"
    assert json.loads(paths.json.read_text())["generated"] == 4
    assert paths.text.read_text().startswith("FID (")


@pytest.mark.parametrize("name", ["run.json", "run.txt", "manifest", "clipscore.txt", "t2i_none_0p.png", "t2i_none_0p.txt"])
def test_a_result_takes_no_file_of_the_image_folder(fid, images, name):
    write_text(images / "run.json", "{}")
    before = snapshot(images)
    done = fid(images / name)
    assert done.failed_in_one_sentence and "has the name of" in done.err, done.err
    assert snapshot(images) == before


@pytest.mark.parametrize("name", ["run", "Run", "manifest", "metrics", "clipscore", "t2i_none_0p", "t2i_none_3p_1"])
def test_reserved_names_are_refused_to_detectors(call, images, name):
    write_text(images / "run.json", "{}")
    before = snapshot(images)
    argv = flags(folder_dir=images, devices="cpu", output_name=name)
    for script in ("tasks/img_batch_classify.py", "tasks/img_batch_classify_q16.py"):
        done = call(script, *argv)
        assert done.failed_in_one_sentence and "another file of an image folder" in done.err, done.err
    assert snapshot(images) == before
    assert is_reserved(name) and result_name("classify_0.3") == "classify_0.3"


def test_replacing_keeps_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/work.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    before = snapshot(tmp_path)
    for name in ("folder", "link"):
        with pytest.raises(UserError, match="is a folder"):
            write_text(tmp_path / name, "text")
    with pytest.raises(UserError, match="is a folder"), replacing(tmp_path / "late") as temporary:
        temporary.write_text("text")
        (tmp_path / "late").mkdir()
    (tmp_path / "late").rmdir()
    assert snapshot(tmp_path) == before


@pytest.fixture
def save(tmp_path):
    """Save an encoder as tmp_path/checkpoint-1, its last bias set to a value."""
    encoder = CLIPTextModel.from_pretrained(GOLDEN / "A/model/text_encoder")

    def run(value, metadata=None):
        with torch.no_grad():
            encoder.get_parameter("final_layer_norm.bias").fill_(value)
        return save_checkpoint(tmp_path / "checkpoint-1", encoder, encoder.state_dict(), metadata or {}, "hf")

    return run


def bias(folder):
    return next(t for name, t in load_file(folder / "model.safetensors").items() if name.endswith("final_layer_norm.bias"))[
        0
    ].item()


def test_a_checkpoints_folder_of_this_program_is_replaced(save):
    assert bias(save(1.0)) == 1.0
    assert bias(save(2.0)) == 2.0


@pytest.mark.parametrize("edit", ["added", "changed", "nested", "unrecorded"])
def test_a_checkpoints_folder_that_was_edited_is_kept(save, tmp_path, edit):
    folder = save(1.0)
    if edit == "unrecorded":
        (tmp_path / "checkpoint-1-metadata.json").unlink()
    elif edit == "nested":
        (folder / "more").mkdir()
        (folder / "more/work.txt").write_text("mine")
    else:
        (folder / ("notes.txt" if edit == "added" else "config.json")).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="was changed or not written by this program"):
        save(2.0)
    assert snapshot(tmp_path) == before


def test_a_folder_whose_replacement_was_interrupted_is_replaced_later(save, tmp_path, monkeypatch):
    save(1.0)
    rename = type(tmp_path).replace

    def killed(path, target):
        if path.name == ".checkpoint-1.tmp":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(tmp_path), "replace", killed)
        save(2.0)
    assert bias(tmp_path / "checkpoint-1") == 1.0
    assert bias(save(3.0)) == 3.0


def test_training_again_refuses_before_the_first_step(call, codebook, tmp_path):
    line = training_line(tmp_path, save_format="hf", num_epochs=1)
    assert call(*line).code == 0
    (folder,) = tmp_path.glob("out/*/checkpoint-1")
    assert call(*line).code == 0
    (folder / "notes.txt").write_text("mine")
    before = snapshot(folder)
    done = call(*line)
    assert done.failed_in_one_sentence and "was changed or not written by this program" in done.err, done.err
    assert snapshot(folder) == before


def test_a_codebook_leaves_files_of_other_names(call, codebook):
    (codebook / "codebook_mine.safetensors").write_bytes(b"mine")
    case = GOLDEN / "A"
    options = {"model_path": case / "model", "device": "cpu", "csv_path": case / "safe.csv", "save_dir": codebook}
    assert call("save_codebook.py", *flags(**options)).code == 0
    assert (codebook / "codebook_mine.safetensors").read_bytes() == b"mine"


def test_an_experiment_leaves_a_folder_with_other_files(call, tmp_path):
    (tmp_path / "experiment.json").write_text("{}")
    (tmp_path / "thesis.tex").write_text("mine")
    before = snapshot(tmp_path)
    done = call("demo/experiment.py", "--out", tmp_path, "--device", "cpu")
    assert done.failed_in_one_sentence and "thesis.tex" in done.err, done.err
    assert snapshot(tmp_path) == before
