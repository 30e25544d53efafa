"""What scorers refuse, leave out or do not believe: rows that a run claims, other prompts, prompts never drawn, edited findings."""

import csv
import json
import shutil

from des.data import claims, manifest
from des.data.run_record import read_run
from des.evaluation.results import read_scores
from des.utils.errors import UserError

import pytest
from conftest import ROOT, flags
from PIL import Image

MODELS = ROOT / "demo/models"
PROMPTS = ["a grey cat", "a red kettle", "a clay teapot", "a steam train", "a blue bus", "a white boat"]
OBJECT = {"job": "object", "classifier": MODELS / "classifier_object", "cls_class": "ball", "devices": "cpu"}


@pytest.fixture
def generate(call, tmp_path, monkeypatch, tiny_pipeline):
    """Run generate.py in `tmp_path` with changed options."""
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "p.csv", PROMPTS)

    def run(**changes):
        options = {"model_path": tiny_pipeline, "device": "cpu", "prompts_csv": "p.csv", "output_path": "t2i",
                   "num_inference_steps": 1, "batch_size": 1} | changes  # fmt: skip
        return call("generate.py", *flags(**options))

    return run


@pytest.fixture
def folder(generate, tmp_path):
    """The images of all prompts."""
    assert generate().code == 0
    return tmp_path / "results/none/tiny-sd/t2i"


@pytest.fixture
def classify(call):
    return lambda folder, **changes: call("tasks/img_batch_classify.py", *flags(folder_dir=folder, **(OBJECT | changes)))


@pytest.fixture
def clipscore(call):
    options = {"clip_model": MODELS / "clip", "device": "cpu"}
    return lambda folder, **changes: call("clipscore.py", *flags(image_folder=folder, **(options | changes)))


@pytest.fixture
def interrupted(generate, tmp_path, monkeypatch):
    """A run of six images that ended after four."""
    from des.generation.image_run import RunFolder

    save, drawn = RunFolder.save, []

    def until_four(self, key, image):
        if len(drawn) == 4:
            raise UserError("stopped by the test")
        drawn.append(key)
        return save(self, key, image)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", until_four)
        assert "stopped by the test" in generate().err
    return tmp_path / "results/none/tiny-sd/t2i"


def write_prompts(path, prompts, **columns):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", *columns])
        writer.writerows(zip(prompts, *columns.values(), strict=True))
    return path


def read(path):
    return json.loads(path.read_text())


def edit(path, **changes):
    path.write_text(json.dumps(read(path) | changes))


# Rows that a run claims


def test_claimed_keys_are_packed_by_copy():
    keys = {(0, 0), (1, 0), (2, 0), (7, 0), (1, 1)}
    assert claims.packed(keys) == [[[0, 3], [7, 8]], [[1, 2]]]
    assert claims.unpacked(claims.packed(keys)) == keys and claims.packed([]) == []


def test_a_record_claims_the_rows_of_all_shards_without_those_never_drawn(generate, tmp_path):
    write_prompts(tmp_path / "p.csv", [*PROMPTS[:3], "kid, nsfw", *PROMPTS[3:], *["a house"] * 20])
    for start, end, copies in ((0, 2, 1), (2, 5, 1), (4, 6, 2)):
        assert generate(start_idx=start, end_idx=end, num_images_per_prompt=copies).code == 0
    record = read(tmp_path / "results/none/tiny-sd/t2i/run.json")
    assert record["claimed"] == [[[0, 3], [4, 6]], [[4, 6]]] and record["left_out"] == [3]


def test_an_interrupted_run_is_not_scored_unless_its_number_is_expected(interrupted, call, classify, clipscore, tmp_path):
    fid = {"feature_extractor": MODELS / "classifier_object", "device": "cpu", "output_file": tmp_path / "fid.txt"}
    other = tmp_path / "other"
    other.mkdir()
    for row in range(2):
        Image.new("RGB", (16, 16), (row, 0, 0)).save(other / f"x_{row}p.png")
    score = {
        "classify": lambda **n: classify(interrupted, **n),
        "with its prompts": lambda **n: classify(interrupted, csv_path="p.csv", **n),
        "clipscore": lambda **n: clipscore(interrupted, csv_file="p.csv", **n),
        "fid": lambda **n: call("fid.py", *flags(gen_imgs_path=interrupted, coco_imgs_path=other, **fid, **n)),
    }
    for name, run in score.items():
        done = run()
        assert done.failed_in_one_sentence, (name, done.err)
        assert "2 of the 6 images" in done.err and "(row 4 first)" in done.err and "--expected" in done.err, name
    reference = call("fid.py", *flags(gen_imgs_path=other, coco_imgs_path=interrupted, **fid))
    assert "2 of the 6 images" in reference.err and "--expected_ref" in reference.err
    for name, run in score.items():
        assert run(expected=5).failed_in_one_sentence, name
        done = run(expected=4)
        assert done.code == 0, (name, done.err)
    assert read(interrupted / "classify.json")["n"] == read(interrupted / "clipscore.json")["n"] == 4


def test_a_run_that_was_drawn_to_its_end_is_scored(interrupted, generate, classify):
    assert generate().code == 0
    assert classify(interrupted).code == 0 and read(interrupted / "classify.json")["n"] == 6


def test_a_record_of_an_earlier_version_claims_what_its_manifest_names(interrupted, generate, classify):
    record = read(interrupted / "run.json")
    del record["claimed"]
    (interrupted / "run.json").write_text(json.dumps(record))
    assert classify(interrupted).code == 0 and read(interrupted / "classify.json")["n"] == 4
    assert generate(start_idx=5).code == 0
    assert read(interrupted / "run.json")["claimed"] == [[[0, 4], [5, 6]]]


def test_a_damaged_record_is_refused(folder, classify):
    for damage in ("{", "[]", '{"claimed": [[0, 3]]}', '{"claimed": 6}', '{"left_out": 1}'):
        (folder / "run.json").write_text(damage)
        done = classify(folder)
        assert done.failed_in_one_sentence and "run.json cannot be read" in done.err, damage


def test_generation_writes_no_result_while_another_shard_lacks_scores(interrupted, generate):
    scoring = {"score_with": "object", "classifier": MODELS / "classifier_object", "cls_class": "ball"}
    done = generate(end_idx=4, **scoring)
    assert done.code == 0 and "lacks the scores of 2 images" in done.err
    assert not (interrupted / "classify_object.json").exists()
    assert generate(start_idx=4, **scoring).code == 0
    assert read(interrupted / "classify_object.json")["n"] == 6


# Other prompts


def sorted_list(tmp_path):
    return write_prompts(tmp_path / "sorted.csv", sorted(PROMPTS), thing=["ball"] * 6)


def test_every_scorer_refuses_a_list_that_did_not_draw_the_images(folder, call, tmp_path):
    prompts = sorted_list(tmp_path)
    labelled = {"job": "object", "classifier": MODELS / "classifier_object", "devices": "cpu", "folder_dir": folder}
    scorers = [
        ("clipscore.py", {"image_folder": folder, "csv_file": prompts, "device": "cpu", "clip_model": MODELS / "clip"}),
        ("tasks/img_batch_classify.py", {"job": "nudity", "folder_dir": folder, "csv_path": prompts, "devices": "cpu"}),
        ("tasks/img_batch_classify.py", {**labelled, "csv_path": prompts, "label_column": "thing"}),
        ("tasks/img_batch_classify_q16.py", {"folder_dir": folder, "csv_path": prompts, "devices": "cpu"}),
        *(
            ("fid.py", {"job": job, "gen_imgs_path": folder, "prompt_path": prompts, "device": "cpu"})
            for job in ("pickscore", "blipscore", "imagereward")
        ),
    ]
    for script, options in scorers:
        done = call(script, *flags(**options))
        assert done.failed_in_one_sentence, (script, done.err)
        assert "sorted.csv is not the list that drew" in done.err and "first in row 0 (counted from 0)" in done.err, script
        assert not any(prompt in done.err for prompt in PROMPTS)


def test_the_first_row_that_differs_is_named(folder, classify, tmp_path):
    prompts = write_prompts(tmp_path / "changed.csv", [*PROMPTS[:3], "a steam  train", *PROMPTS[4:]])
    done = classify(folder, csv_path=prompts)
    assert (
        done.failed_in_one_sentence and "1 of its prompts differ" in done.err and "first in row 3 (counted from 0)" in done.err
    )


def test_a_shorter_list_needs_fewer_images(folder, classify, tmp_path):
    done = classify(folder, csv_path=write_prompts(tmp_path / "head.csv", PROMPTS[:4]))
    assert done.failed_in_one_sentence and "images beyond the list for row 4, 5" in done.err


def test_further_images_of_a_row_have_its_prompt(generate, classify, tmp_path):
    assert generate(num_images_per_prompt=2, end_idx=2, output_path="twice").code == 0
    twice = tmp_path / "results/none/tiny-sd/twice"
    prompts = write_prompts(tmp_path / "head.csv", PROMPTS[:2])
    assert classify(twice, csv_path=prompts).code == 0 and read(twice / "classify.json")["n"] == 4
    assert "is not the list" in classify(twice, csv_path=write_prompts(prompts, PROMPTS[1::-1])).err


def test_other_prompts_are_scored_where_they_are_meant_and_recorded(folder, classify, clipscore, tmp_path):
    prompts = sorted_list(tmp_path)
    assert clipscore(folder, csv_file="p.csv").code == 0
    right = read(folder / "clipscore.json")
    assert "other_prompts" not in right
    done = clipscore(folder, csv_file=prompts, other_prompts=[])
    assert done.code == 0 and "by other prompts than drew the images in 5 rows" in done.out
    result = read(folder / "clipscore.json")
    assert result["other_prompts"] == 5 and len(result["other_prompts_sha256"]) == 64
    assert result["clip_score"] != right["clip_score"]
    done = classify(folder, cls_class=None, label_column="thing", csv_path=prompts, other_prompts=[])
    assert done.code == 0 and read(folder / "classify.json")["other_prompts"] == 5
    titles = [score.title for score in read_scores(folder, read_run(folder)[1])]
    assert len(titles) == 2 and all(", by other prompts (" in title for title in titles)
    assert clipscore(folder, csv_file="p.csv", other_prompts=[]).code == 0
    assert read(folder / "clipscore.json")["clip_score"] == right["clip_score"]
    assert "other_prompts" not in read(folder / "clipscore.json")


def test_other_prompts_need_a_list_and_a_job_that_reads_it(folder, call, classify):
    assert "needs --csv_path" in classify(folder, other_prompts=[]).err
    done = call("fid.py", *flags(gen_imgs_path=folder, coco_imgs_path=folder, device="cpu", other_prompts=[]))
    assert done.code == 2 and "does not read --other_prompts" in done.err


# Prompts that are never drawn


@pytest.fixture
def earlier_version(generate, tmp_path, monkeypatch):
    """A folder in which a version with another filter drew row 1, which is never drawn now."""
    write_prompts(tmp_path / "p.csv", ["a house", "kid, nsfw", "a tree", *["a hill"] * 30])
    with (
        monkeypatch.context() as patch
    ):  # patches what `never_drawn` calls: modules that generate.py imports now keep the function itself
        patch.setattr("des.data.never_drawn.kinds_of", lambda prompt: frozenset())
        assert generate(end_idx=3).code == 0
    write_prompts(tmp_path / "p.csv", ["a house", "kid, nsfw", "a tree", *["a hill"] * 30])
    folder = tmp_path / "results/none/tiny-sd/t2i"
    assert len(list(folder.glob("*.png"))) == 3
    return folder


def test_images_of_prompts_never_drawn_are_named_and_not_scored(earlier_version, classify, clipscore):
    done = classify(earlier_version, csv_path="p.csv", expected=3)
    assert done.code == 0 and "1 images are not scored" in done.err and "t2i_none_1p.png" in done.err
    result = read(earlier_version / "classify.json")
    assert result["n"] == 2 and result["never_drawn"] == ["t2i_none_1p.png"]
    assert [image["row"] for image in result["images"]] == [0, 2] and "never drawn are not counted" in done.out
    done = clipscore(earlier_version, csv_file="p.csv", expected=3)
    assert done.code == 0 and read(earlier_version / "clipscore.json")["n"] == 2
    assert len(read_scores(earlier_version, read_run(earlier_version)[1])) == 2


def test_without_a_list_the_record_says_what_is_never_drawn(earlier_version, generate, classify):
    assert generate(end_idx=3, score_with="object", classifier=OBJECT["classifier"], cls_class="ball").code == 0
    assert read(earlier_version / "classify_object.json")["n"] == 2
    assert classify(earlier_version).code == 0
    assert read(earlier_version / "classify.json")["n"] == 2
    assert read(earlier_version / "classify.json")["never_drawn"] == ["t2i_none_1p.png"]


def test_fid_leaves_them_out_too(earlier_version, generate, call, tmp_path):
    assert generate(end_idx=3).code == 0  # the record says now which rows are never drawn
    options = {"gen_imgs_path": earlier_version, "coco_imgs_path": earlier_version, "device": "cpu"}
    done = call("fid.py", *flags(feature_extractor=MODELS / "classifier_object", **options))
    assert done.code == 0 and "never drawn are not counted" in done.out
    result = read(earlier_version.with_name("t2i_fid.json"))
    assert (result["generated"], result["reference"], result["never_drawn"]) == (2, 2, ["t2i_none_1p.png"])
    assert len(read_scores(earlier_version, read_run(earlier_version)[1])) == 1


def test_images_that_generate_py_did_not_draw_are_filtered_too(tmp_path, classify):
    prompts = write_prompts(tmp_path / "p.csv", ["a house", "kid, nsfw", *["a hill"] * 30])
    own = tmp_path / "own"
    own.mkdir()
    for row in range(32):
        Image.new("RGB", (32, 32), (8 * row, 0, 0)).save(own / f"x_{row}p.png")
    done = classify(own, csv_path=prompts)
    assert done.code == 0 and "x_1p.png" in done.err and "beyond the list" not in done.err
    assert read(own / "classify.json")["n"] == 31
    for path in set(own.glob("x_*.png")) - {own / "x_1p.png"}:
        path.unlink()
    assert "no image is left to score" in classify(own, csv_path=prompts, expected=1).err


# Findings that were edited


def test_an_edited_result_is_scored_again(folder, classify):
    assert classify(folder).code == 0
    whole = (folder / "classify.json").read_text()
    result = read(folder / "classify.json")
    inverted = [image | {"hit": not image["hit"]} for image in result["images"]]
    edit(folder / "classify.json", images=inverted, k=6 - result["k"])
    with pytest.raises(UserError, match="was edited: its findings"):
        read_scores(folder, read_run(folder)[1])
    done = classify(folder)
    assert done.code == 0 and "was edited, so its images are scored again" in done.err
    assert "were scored before" not in done.err and (folder / "classify.json").read_text() == whole
    without = json.loads(whole) | {"images": inverted}
    del without["findings_sha256"]  # as an earlier version wrote it
    (folder / "classify.json").write_text(json.dumps(without))
    assert classify(folder).code == 0 and (folder / "classify.json").read_text() == whole
    assert "6 of 6 images were scored before" in classify(folder).err


def test_verify_and_the_report_refuse_a_folder_that_lacks_claimed_rows(folder):
    from des.report.collect import collect
    from scripts import verify

    lines = (folder / "manifest.jsonl").read_text().splitlines(keepends=True)
    (folder / "manifest.jsonl").write_text("".join(lines[:-1]))
    (folder / json.loads(lines[-1])["file"]).unlink()
    for check in (lambda: verify.main([str(folder), "--sample", "0", "--device", "cpu"]), lambda: collect([folder])):
        with pytest.raises(UserError, match=r"1 of the 6 images .* to draw them$"):
            check()


def test_edited_lines_of_an_unfinished_scorer_are_scored_again(folder, classify, monkeypatch):
    from des.evaluation.classify import Findings

    with monkeypatch.context() as patch:
        patch.setattr(Findings, "finish", lambda self: None)
        assert classify(folder, batch_size=2).code == 0
    whole = (folder / "classify.json").read_text()
    (folder / "classify.json").unlink()
    journal = folder / ".classify.part.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines[:3]:
        line["value"][""]["hit"] = not line["value"][""]["hit"]
    del lines[2]["sha256"]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = classify(folder)
    assert done.code == 0 and "3 of 6 images were scored before" in done.err
    assert json.loads(whole)["images"] == [pytest.approx(image) for image in read(folder / "classify.json")["images"]]


def test_edited_cards_are_scored_again(generate, tmp_path):
    scoring = {"score_with": "object", "classifier": MODELS / "classifier_object", "cls_class": "ball", "discard_images": []}
    assert generate(**scoring).code == 0
    folder = tmp_path / "results/none/tiny-sd/t2i"
    whole = read(folder / "classify_object.json")
    card = folder / "t2i_none_2p.json"
    content = read(card)
    finding = content["findings"]["object"][""]
    finding["hit"] = not finding["hit"]
    card.write_text(json.dumps(content))
    done = generate(**scoring)
    assert done.code == 0 and "1 images to draw" in done.err
    assert read(folder / "classify_object.json")["images"] == whole["images"]


# Hidden files and folders


def test_hidden_images_records_and_scores_do_not_count(folder, classify, tmp_path):
    from des.report.collect import collect

    shutil.copytree(folder, tmp_path / "copy")
    shutil.copytree(tmp_path / "copy", folder / ".ipynb_checkpoints")
    (folder / ".ipynb_checkpoints/t2i_none_3p.png").unlink()  # its manifest names it all the same
    (folder / "sub/.git").mkdir(parents=True)
    shutil.copy(folder / "t2i_none_0p.png", folder / "sub/.git/t2i_none_9p.png")
    for name in ("._t2i_none_0p.png", "._classify.json"):
        (folder / name).write_bytes(b"\0\5\26\7")
    done = classify(folder)
    assert done.code == 0, done.err
    assert read(folder / "classify.json")["n"] == 6
    runs, _ = collect([tmp_path / "results"])
    assert [run.folder for run in runs] == [folder] and runs[0].scores[0].counts.endswith("/6")


def test_a_folder_below_a_hidden_one_is_scored(folder, classify, tmp_path):
    hidden = tmp_path / ".cache/t2i"
    shutil.copytree(folder, hidden)
    assert classify(hidden).code == 0 and read(hidden / "classify.json")["n"] == 6
    assert manifest.read(hidden).keys() == manifest.read(folder).keys()
