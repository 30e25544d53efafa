"""generate.py on a tiny pipeline: names, reproducibility, resume, and refusal of what would mislead."""

import json

import numpy as np
import pytest
import torch
from conftest import flags, published_form, snapshot, spawn
from PIL import Image

PROMPTS = ["a grey cat", "a red kettle", "", "a clay teapot", "a steam train", "a stack of books"]
PREFIX = "results/{method}/tiny-sd/t2i/t2i_{method}_{row}p.png"


@pytest.fixture
def prompts_csv(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("prompt\n" + "\n".join(f'"{prompt}"' for prompt in PROMPTS) + "\n")
    return path


@pytest.fixture
def generate(call, tmp_path, monkeypatch, tiny_pipeline, prompts_csv):
    """Run generate.py in `tmp_path` with changed options (None leaves one out)."""
    monkeypatch.chdir(tmp_path)

    def run(**changes):
        options = {
            "model_path": tiny_pipeline,
            "device": "cpu",
            "prompts_csv": prompts_csv,
            "output_path": "t2i",
            "num_inference_steps": 2,
        } | changes
        return call("generate.py", *flags(**options))

    return run


def pixels(folder, method="none"):
    return {
        path.name: np.asarray(Image.open(path)).astype(int)
        for path in sorted(folder.glob(f"results/{method}/tiny-sd/t2i/*.png"))
    }


def test_names_rows_and_record(generate, tmp_path):
    done = generate()
    assert done.code == 0, done.err
    assert sorted(snapshot(tmp_path / "results/none/tiny-sd/t2i")) == [
        "manifest.jsonl", "run.json", *[f"t2i_none_{row}p.png" for row in range(5)],
    ]  # fmt: skip
    record = json.loads((tmp_path / "results/none/tiny-sd/t2i/run.json").read_text())
    assert record["settings"]["seed"] == 42 and record["protection"] == {}


def test_an_image_is_the_same_at_any_batch_size_order_and_resume(generate, tmp_path, prompts_csv):
    images = {}
    for name, options in {
        "one": {"batch_size": 1},
        "all": {"batch_size": 5},
        "late": {"start_idx": 3, "batch_size": 2},
    }.items():
        assert generate(results_dir=f"{name}/results", **options).code == 0
        images[name] = pixels(tmp_path / name)
    assert len(images["one"]) == 5 and len(images["late"]) == 2
    for name in ("all", "late"):
        for file, image in images[name].items():
            assert np.abs(image - images["one"][file]).max() <= 1, (
                name,
                file,
            )  # convolutions round differently at another batch size
    assert np.abs(images["one"]["t2i_none_0p.png"] - images["one"]["t2i_none_1p.png"]).max() > 1


def test_an_image_has_the_same_bytes_whatever_is_drawn_beside_it(generate, tmp_path):
    runs = {"all": {}, "late": {"start_idx": 4}, "middle": {"start_idx": 1, "end_idx": 3}}
    for name, options in runs.items():
        assert generate(results_dir=f"{name}/results", batch_size=3, **options).code == 0
    whole = snapshot(tmp_path / "all/results")
    for name, count in (("late", 1), ("middle", 2)):
        part = {file: content for file, content in snapshot(tmp_path / name / "results").items() if file.endswith("png")}
        assert len(part) == count
        assert all(whole[file] == content for file, content in part.items())


def test_the_same_command_gives_the_same_bytes(generate, tmp_path):
    for name in ("a", "b"):
        assert generate(results_dir=name).code == 0
    a, b = ({file: content for file, content in snapshot(tmp_path / name).items() if file.endswith("png")} for name in "ab")
    assert a == b and len(a) == 5


def test_finished_images_are_kept_and_broken_ones_drawn_again(generate, tmp_path):
    assert generate().code == 0
    whole = snapshot(tmp_path / "results")
    broken, kept = (tmp_path / PREFIX.format(method="none", row=row) for row in (1, 2))
    broken.write_bytes(broken.read_bytes()[:-30])
    stamp = kept.stat().st_mtime_ns
    done = generate(log_file=tmp_path / "second.log")  # which is no setting of an image
    assert "1 images to draw" in done.err and "4 already done" in done.err
    assert kept.stat().st_mtime_ns == stamp
    after = snapshot(tmp_path / "results")
    assert all(after[name] == whole[name] for name in whole if name.endswith("png"))


def test_a_protected_model_draws_something_else(generate, tmp_path, protected_checkpoint):
    assert generate().code == 0
    done = generate(training_method="des", text_encoder_path=protected_checkpoint)
    assert done.code == 0, done.err
    original, protected = pixels(tmp_path), pixels(tmp_path, "des")
    assert len(protected) == 5
    assert all(np.abs(a - b).max() > 0 for a, b in zip(original.values(), protected.values(), strict=True))
    record = json.loads((tmp_path / "results/des/tiny-sd/t2i/run.json").read_text())
    assert record["settings"]["text_encoder_sha256"] == record["protection"]["1"]["encoder_sha256"]


def test_end_beyond_the_list_is_its_end_and_is_said(generate, tmp_path):
    done = generate(start_idx=4, end_idx=10000)
    assert done.code == 0 and "--end_idx 10000 is beyond the list" in done.err
    assert len(pixels(tmp_path)) == 1


def test_one_prompt_and_its_options(generate, tmp_path):
    done = generate(prompts_csv=None, prompt="a clay teapot", negative_prompt="a cat", height=8, width=24, guidance_scale=2)
    assert done.code == 0, done.err
    assert Image.open(tmp_path / PREFIX.format(method="none", row=0)).size == (24, 8)


def test_other_settings_never_mix_in_one_folder(generate, tmp_path):
    assert generate().code == 0
    before = snapshot(tmp_path / "results")
    for change in ({"seed": 7}, {"num_inference_steps": 3}, {"guidance_scale": 3}):
        done = generate(**change)
        assert done.failed_in_one_sentence and next(iter(change)) in done.err
    (tmp_path / "results/none/tiny-sd/t2i/run.json").unlink()
    assert "unknown origin" in generate().err
    del before["none/tiny-sd/t2i/run.json"]
    assert before == snapshot(tmp_path / "results")


def test_prompts_that_are_never_drawn_keep_their_numbers(generate, tmp_path, prompts_csv):
    prompts_csv.write_text('prompt\na house\n"kid, nsfw"\na tree\n')
    done = generate()
    assert done.code == 0 and "1 of 3 prompts are left out" in done.err
    assert sorted(pixels(tmp_path)) == ["t2i_none_0p.png", "t2i_none_2p.png"]
    prompts_csv.write_text("prompt\na house\na kid at the beach\na tree\n")
    done = generate(output_path="without", negative_prompt="clothes")
    assert done.code == 0 and "1 of 3 prompts are left out" in done.err
    assert json.loads((tmp_path / "results/none/tiny-sd/without/run.json").read_text())["left_out"] == [1]


def test_a_list_that_lost_rows_is_seeded_by_its_published_numbers(generate, tmp_path, prompts_csv):
    prompts_csv.write_text("prompt,source_row\na grey cat,0\na red kettle,7\na steam train,\n")
    done = generate()
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "results/none/tiny-sd/t2i/manifest.jsonl").read_text().splitlines()]
    assert {line["file"]: line["seed"] for line in lines} == {
        "t2i_none_0p.png": 42, "t2i_none_1p.png": 49, "t2i_none_2p.png": 44,
    }  # fmt: skip
    prompts_csv.write_text("prompt,source_row\na grey cat,x\n")
    done = generate(output_path="other")
    assert done.failed_in_one_sentence and "row 0, column source_row" in done.err


def test_an_image_that_is_lost_meanwhile_is_not_counted(generate, tmp_path, monkeypatch):
    import des.generation.image_run

    whole = des.generation.image_run.RunFolder.save

    def lose(self, key, image):
        line = whole(self, key, image)
        if key[0] == 1:
            self.names[key].unlink()
        return line

    monkeypatch.setattr(des.generation.image_run.RunFolder, "save", lose)
    done = generate()
    assert done.failed_in_one_sentence and "1 of 5 images are not in" in done.err and "row 1" in done.err


def broken_checkpoint(tmp_path, tiny_pipeline, other_width, protected, what):
    path = tmp_path / "broken.pt"
    if what == "truncated":
        path.write_bytes(protected.read_bytes()[:-200])
    elif what == "own weights":
        published_form(tiny_pipeline, path)
    elif what == "another model":
        published_form(other_width, path)
    elif what == "wrong prefix":
        state = torch.load(protected, weights_only=True)["model_state_dict"]
        torch.save({"model_state_dict": {f"other.{name}": tensor for name, tensor in state.items()}}, path)
    return path


@pytest.mark.parametrize("what", ["missing", "truncated", "own weights", "another model", "wrong prefix"])
def test_no_image_without_the_protection_asked_for(generate, tmp_path, tiny_pipeline, other_width, protected_checkpoint, what):
    path = broken_checkpoint(tmp_path, tiny_pipeline, other_width, protected_checkpoint, what)
    done = generate(training_method="des", text_encoder_path=path)
    assert done.failed_in_one_sentence, done.err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"training_method": "des"},
        {"text_encoder_path": "x.pt"},
        {"model_path": "nowhere"},
        {"model_path": "no/where"},
        {"model_type": "sd_v2"},
        {"start_idx": 5, "end_idx": 5},
        {"start_idx": 99},
        {"output_path": "../out"},
        {"prompts_csv": "nowhere.csv"},
        {"prompt": "two sources"},
        {"guidance_scale": "nan"},
    ],
)
def test_bad_input_writes_nothing(generate, tmp_path, change):
    done = generate(**change)
    assert done.failed_in_one_sentence, done.err
    assert not (tmp_path / "results").exists()


def test_an_error_is_one_line_in_a_separate_process(tmp_path, tiny_pipeline):
    done = spawn(
        "generate.py",
        "--model_path",
        tiny_pipeline,
        "--prompts_csv",
        "none.csv",
        "--output_path",
        "x",
        "--device",
        "cpu",
        cwd=tmp_path,
    )
    assert (done.code, done.out, done.err) == (
        1,
        "",
        f"error: the prompt file none.csv does not exist in the current folder, {tmp_path}; datasets/download.py downloads public ones\n",
    )
