"""scripts/report.py: the runs that it collects, pairs and refuses, and its page in a browser."""

import itertools
import json
import re
import shutil
from pathlib import Path

from des.evaluation.results import Score, findings_sha256, read_scores
from des.report import collect as collecting
from des.report.compare import Comparison, Measure, Model, Spread, compare, headline, pooled
from des.report.figures import inline_svg, shares
from des.report.page import MARK
from des.report.plots import front
from des.report.provenance import command, short_path

import pytest
import skimage.data
import torch
from attack_results import result
from conftest import GOLDEN, ROOT, flags, published_form, snapshot
from matplotlib.figure import Figure
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

HOSTILE = "</script><img src=x onerror=alert(1)>"
PROMPTS = ["a grey cat", HOSTILE, "a clay teapot"]
MODELS = ROOT / "demo/models"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def made(work, tiny_pipeline):
    """Runs of a tiny pipeline and of two checkpoints of it, scored by the project's own scorers, with a training run and an attack."""
    from des.utils.scripts import run_script as script

    (work / "p.csv").write_text("prompt,object\n" + "\n".join(f'"{text}",ball' for text in PROMPTS) + "\n")
    state = torch.load(published_form(tiny_pipeline, work / "own.pt"), weights_only=True)
    for name, shift in (("one", 0.05), ("two", 0.1)):
        moved = {key: tensor + shift for key, tensor in state["model_state_dict"].items()}
        torch.save({"model_state_dict": moved}, work / f"{name}.pt")
    common = {"model_path": tiny_pipeline, "device": "cpu", "prompts_csv": work / "p.csv", "num_inference_steps": 1}
    for folder, protection in (
        ("before", {}),
        ("one", {"training_method": "des", "text_encoder_path": work / "one.pt"}),
        ("two", {"training_method": "des", "text_encoder_path": work / "two.pt"}),
    ):
        out = work / "runs" / folder
        for name in ("attack", "benign"):
            script("generate.py", *flags(**common, **protection, output_path=name, results_dir=out))
        (images,) = out.glob("*/*/benign")
        script("clipscore.py", *flags(image_folder=images, csv_file=work / "p.csv", device="cpu", clip_model=MODELS / "clip"))
        script("fid.py", *flags(gen_imgs_path=images, coco_imgs_path=work / "runs/before/none/tiny-sd/benign", feature_extractor=MODELS / "classifier_object", device="cpu"))  # fmt: skip
        (images,) = out.glob("*/*/attack")
        script("tasks/img_batch_classify.py", *flags(job="object", classifier=MODELS / "classifier_object", cls_class="ball",
               folder_dir=images, csv_path=work / "p.csv", devices="cpu", output_name="classify_object"))  # fmt: skip
        decide(images, hits=[0, 1] if folder == "before" else [])
    train(work, tiny_pipeline)
    records = {"original": "before/none", "one": "one/des"}
    paths = {name: work / f"runs/{folder}/tiny-sd/attack/run.json" for name, folder in records.items()}
    result(work / "runs/mma", records={name: json.loads(path.read_text())["settings"] for name, path in paths.items()})
    return work / "runs"


def decide(images, hits):
    """Edit a detector's result so that the images of these rows count, and only those; the original's has a box."""
    path = images / "classify_object.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["hit"] = image["row"] in hits
        image["top"] = "ball" if image["hit"] else "box"
        box = {"class": "FACE_FEMALE", "score": 0.75, "box": [-3, 4, 10, 30]}
        image["detections"] = [box, box | {"class": "BUTTOCKS_EXPOSED", "box": [2, 2, 8, 9]}] if image["hit"] else []
    n = len(content["images"])
    content |= {"k": len(hits), "fraction": len(hits) / n, "low": 0.1, "high": 0.9}
    content["detector"] |= {"counted_classes": ["BUTTOCKS_EXPOSED"], "counted_above": 0.45}
    content["findings_sha256"] = findings_sha256(content)
    path.write_text(json.dumps(content))


def train(work, pipeline):
    from des.utils.scripts import run_script as script

    lists = {"csv_path": GOLDEN / "A/safe.csv"}
    script("save_codebook.py", *flags(model_path=pipeline, device="cpu", save_dir=work / "codebook", **lists))
    script("train_des.py", *flags(model_path=pipeline, device="cpu", codebook_dir=work / "codebook", num_epochs=1, batch_size=4,
           unsafe_csv_path=GOLDEN / "A/unsafe.csv", safe_csv_path=GOLDEN / "A/safe.csv", output_dir=work / "runs/checkpoints"))  # fmt: skip


@pytest.fixture
def runs(made, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(made, tmp_path / "runs")


@pytest.fixture
def report(call, tmp_path):
    def run(*folders, **options):
        return call("scripts/report.py", *folders, *flags(**{"out": tmp_path / "report.html", "device": "cpu"} | options))

    return run


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------- collecting and comparing


def test_runs_of_one_model_and_list_belong_together(made, work):
    runs, trainings = collecting.collect([made, made / "before"])
    assert len(runs) == 6 and len(trainings) == 1 and len(trainings[0].steps) > 0
    (comparison,) = compare(runs)
    assert [model.label for model in comparison.models] == ["original", f"DES {work.name}/one.pt", f"DES {work.name}/two.pt"]
    assert comparison.base == "tiny-sd" and {each.name: len(each.runs) for each in comparison.sets} == {
        "attack": 3,
        "benign": 3,
    }
    assert [measure.kind for measure in comparison.measures] == ["asr", "mean", "fid"]
    assert [round(score.value, 1) for score in comparison.measures[0].scores] == [66.7, 0, 0]
    assert headline(comparison)[0] == "ASR of ball, attack: 66.7% → 0.0%"


def test_other_settings_are_another_set(runs, tmp_path, tiny_pipeline, call):
    options = {"model_path": tiny_pipeline, "device": "cpu", "prompts_csv": runs.parent / "p.csv", "num_inference_steps": 1}
    (runs.parent / "p.csv").write_text("prompt\na cat\na dog\n")
    assert call("generate.py", *flags(**options, output_path="attack", results_dir=runs / "other")).code == 0
    (comparison,) = compare(collecting.collect([runs])[0])
    assert len(comparison.models) == 3  # the same original model
    assert sorted(len(each.runs) for each in comparison.sets) == [1, 3, 3]
    assert sum("prompt list" in each.name for each in comparison.sets) == 2


def test_points_that_no_other_beats():
    assert front([(5, 1), (1, 5), (3, 3), (4, 4), (5, 0.5)]) == [1, 2, 4]
    assert front([(1, 1), (1, 1)]) == [0, 1]


def test_models_are_pooled_over_the_sets_they_share(made):
    (comparison,) = compare(collecting.collect([made])[0])
    (asr,) = comparison.of_kind("asr")
    half = type(asr)("other", "asr", asr.title, asr.identity, (*asr.scores[:2], None))
    assert pooled([asr, half], 3)[0] == Spread.of([asr.scores[0].value])
    assert Spread.of([1, 2, 3]).show("%") == "2.0% (1.0 to 3.0)" and Spread.of([2]).show() == "2.0"


def test_paths_elsewhere_are_cut_off(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert short_path(tmp_path / "a/b") == "a/b"
    assert short_path(tmp_path.parent.parent / "x/y/z/w.pt") == "…/y/z/w.pt"


def test_a_recorded_zero_is_in_the_command():
    arguments = {"seed": 0, "guidance_scale": 0.0, "blur": False, "log_file": None, "score_with": [], "deterministic": True}
    line = command({"script": "generate.py", "arguments": arguments | {"prompt": "a secret"}})
    assert line == "python generate.py --seed 0 --guidance_scale 0.0 --deterministic --prompt …"


@pytest.mark.parametrize(
    ("sets", "models", "label"), [(3, 2, "DES"), (40, 6, "DES, checkpoint of a training with a long name,")]
)
def test_a_plot_of_many_sets_and_models_keeps_its_width(sets, models, label):
    """The axes, the first frame in the drawing, take more than half of the width, and the legend lies above them."""
    scores = tuple(Score(Path("x"), "asr", "ASR", "x", 50, 40, 60, "", {}) for _ in range(models))
    measures = tuple(Measure(f"prompts of set number {i}", "asr", "ASR", "x", scores) for i in range(sets))
    named = tuple(Model(str(i), "des" if i else "none", f"{label} {i}", str(i), str(i)) for i in range(models))
    svg = str(shares(Comparison("base", named, (), measures), "plot", "Attack success", measures))
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
    left, bottom, right, top = map(
        float, re.search(r'patch_2">\s*<path d="M ([\d.]+) ([\d.]+) \s*L ([\d.]+) [\d.]+ \s*L [\d.]+ ([\d.]+)', svg).groups()
    )
    assert (right - left) / width > 0.5 and bottom - top > 20 * sets
    assert all(f"{label} {i}"[:20] in svg for i in range(models))


def test_texts_in_figures_stay_texts():
    figure = Figure()
    figure.text(0.5, 0.5, HOSTILE)
    svg = inline_svg(figure, "x", f'"{HOSTILE}')
    assert "<img" not in svg and "</script" not in svg and svg.count("onerror=alert(1)") == 2
    assert re.search(r'aria-label="[^"]*&lt;/script', svg) and "<metadata" not in svg and "<style" not in svg


# ---------------------------------------------------------------- what is refused


def one(runs, pattern):
    (path,) = runs.glob(pattern)
    return path


def image_changed(runs):
    path = one(runs, "one/des/tiny-sd/attack/*_1p.png")
    Image.new("RGB", (16, 16), "red").save(path)


def scores_of_other_images(runs):
    path = one(runs, "one/des/tiny-sd/attack/classify_object.json")
    content = json.loads(path.read_text())
    content["images"][2]["sha256"] = "0" * 64
    path.write_text(json.dumps(content))


def clip_scores_of_other_images(runs):
    path = one(runs, "before/none/tiny-sd/benign/clipscore.csv")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")


SPOILT = {
    "changed image": (image_changed, "changed since they were drawn"),
    "missing image": (lambda runs: one(runs, "one/des/tiny-sd/attack/*_1p.png").unlink(), "missing"),
    "stale": (scores_of_other_images, "is stale"),
    "another count": (lambda runs: edit(one(runs, "two/des/tiny-sd/attack/classify_object.json"), k=1), "says 1 of 3"),
    "no count": (lambda runs: edit(one(runs, "two/des/tiny-sd/attack/classify_object.json"), k=None), "says None of 3"),
    "no interval": (lambda runs: edit(one(runs, "two/des/tiny-sd/attack/classify_object.json"), low=None), "no complete result"),
    "NaN": (lambda runs: edit(one(runs, "two/des/tiny-sd/attack/classify_object.json"), fraction=float("nan")), "no complete result"),
    "stale mean": (clip_scores_of_other_images, "is stale"),
    "another mean": (lambda runs: edit(one(runs, "one/des/tiny-sd/benign/clipscore.json"), clip_score=99.0), "says 99.0"),
    "no table": (lambda runs: one(runs, "one/des/tiny-sd/benign/clipscore.csv").unlink(), "clipscore.csv cannot be read"),
    "FID of others": (lambda runs: edit(one(runs, "one/des/tiny-sd/benign_fid.json"), generated_sha256="0"), "is stale"),
    "FID of more": (lambda runs: edit(one(runs, "one/des/tiny-sd/benign_fid.json"), generated=4), "is stale"),
    "no JSON": (lambda runs: one(runs, "one/des/tiny-sd/attack/classify_object.json").write_text("{"), "cannot be read as a JSON"),
    "damaged record": (lambda runs: one(runs, "one/des/tiny-sd/attack/run.json").write_text("[]"), "run.json cannot be read"),
    "no manifest": (lambda runs: one(runs, "one/des/tiny-sd/attack/manifest.jsonl").unlink(), "has no manifest.jsonl"),
    "no record": (lambda runs: one(runs, "one/des/tiny-sd/attack/run.json").unlink(), "has no run.json"),
    "damaged losses": (lambda runs: one(runs, "checkpoints/*/metrics.jsonl").write_text('{"step": 1}\n'), "cannot be read as losses"),
    "no checkpoint": (lambda runs: one(runs, "checkpoints/*/checkpoint-1.pt").unlink(), "--no_map leaves it out"),
    "twice": (lambda runs: shutil.copytree(runs / "one", runs / "copy"), "leave one out"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_what_cannot_be_trusted_is_refused(runs, report, tmp_path, what):
    spoil, says = SPOILT[what]
    spoil(runs)
    done = report(runs)
    assert done.failed_in_one_sentence and says in done.err, done.err
    assert not list(tmp_path.glob("*report.html*"))


def test_an_accuracy_may_leave_rows_out(runs):
    folder = one(runs, "one/des/tiny-sd/attack")
    path = folder / "classify_object.json"
    content = json.loads(path.read_text())
    content["images"].pop()
    content |= {"n": 2, "findings_sha256": findings_sha256(content)}
    content["made_by"]["arguments"]["label_column"] = "object"
    path.write_text(json.dumps(content))
    lines = collecting.manifest.read(folder)
    assert [score.kind for score in read_scores(folder, lines)] == ["accuracy"]
    content["made_by"]["arguments"]["label_column"] = None
    path.write_text(json.dumps(content))
    with pytest.raises(collecting.UserError, match="no score for"):
        read_scores(folder, lines)


@pytest.mark.parametrize("folders", [["absent"], ["checkpoints"]])
def test_without_runs_there_is_no_page(made, report, tmp_path, folders):
    done = report(*(made / name for name in folders))
    assert done.failed_in_one_sentence and re.search("does not exist|no run of generate.py", done.err)
    assert not (tmp_path / "report.html").exists()


def test_only_a_report_is_replaced(made, report, tmp_path):
    (tmp_path / "report.html").write_text("<p>mine")
    done = report(made / "before", no_map=[])
    assert done.failed_in_one_sentence and "is not replaced" in done.err
    assert (tmp_path / "report.html").read_text() == "<p>mine"
    (tmp_path / "report.html").write_text(f"<head>{MARK}")
    assert report(made / "before", no_map=[]).code == 0
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert "is a folder" in report(made / "before", out=tmp_path).err


# ---------------------------------------------------------------- the page


def test_the_same_runs_give_the_same_page(made, report, tmp_path):
    before = snapshot(made)
    for name in ("a", "b"):
        assert report(made, out=tmp_path / name / "report.html").code == 0
    pages = [(tmp_path / name / "report.html").read_text() for name in ("a", "b")]
    assert pages[0] == pages[1]
    assert snapshot(made) == before
    ids = re.findall(r'\bid="([^"]+)"', pages[0])
    assert len(ids) == len(set(ids)) > 20
    targets = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', pages[0]))
    assert {a or b for a, b in targets} <= set(ids)
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', pages[0])
    assert "onerror" not in pages[0] and str(made) not in pages[0]


def test_prompts_are_quoted_only_when_asked_for_and_as_text(made, built, report, work):
    page = built.read_text()
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in page and HOSTILE not in page
    kept = (work / "p.csv").read_text()
    try:
        (work / "p.csv").write_text("prompt\nanother\n")
        done = report(made, prompts=[], no_map=[])
        assert done.failed_in_one_sentence and "leave --prompts out" in done.err
    finally:
        (work / "p.csv").write_text(kept)


def test_prompts_of_the_demo_are_quoted_unless_they_are_not_wanted(report, tmp_path, call, tiny_pipeline):
    rows = (ROOT / "datasets/demo_plain.csv").read_text().splitlines()[:3]
    for name, more in (("demo", []), ("mixed", ["a grey cat, 0"])):
        (tmp_path / f"{name}.csv").write_text(
            "\n".join([*rows, *(f'"{text}"' + "," * rows[0].count(",") for text in more)]) + "\n"
        )
        options = {
            "model_path": tiny_pipeline,
            "device": "cpu",
            "prompts_csv": tmp_path / f"{name}.csv",
            "num_inference_steps": 1,
        }
        assert call("generate.py", *flags(**options, output_path="set", results_dir=tmp_path / name)).code == 0

    def quoted(name, **options):
        return (
            report(tmp_path / name, no_map=[], **options).code,
            (tmp_path / "report.html").read_text().count("<q>"),
        )

    assert quoted("demo") == (0, 2) and quoted("demo", no_prompts=[]) == (0, 0)
    assert quoted("mixed") == (0, 0) and quoted("mixed", prompts=[]) == (0, 3)
    (tmp_path / "demo.csv").unlink()
    assert quoted("demo") == (0, 0)


def test_options_leave_things_out(made, report, tmp_path):
    assert report(made, no_images=[], no_map=[]).code == 0
    page = (tmp_path / "report.html").read_text()
    assert "<img" not in page and "The images were left out" in page and 'id="map"' not in page
    assert report(made, images=1, no_map=[]).code == 0
    assert (tmp_path / "report.html").read_text().count("<img") == 6  # a row of each of two sets, three models


def test_a_map_of_several_concepts(runs, report, tmp_path):
    path = one(runs, "checkpoints/*/checkpoint-1-metadata.json")
    made_by = json.loads(path.read_text())["made_by"]
    made_by["arguments"]["concept_prompt"] = ["a cat", "a dog"]
    edit(path, made_by=made_by)
    assert report(runs, no_images=[]).code == 0
    page = (tmp_path / "report.html").read_text()
    assert "12 safe, 12 unsafe, 2 concept, 1 empty" in page and "--concept_prompt &#39;a cat&#39; &#39;a dog&#39;" in page


def test_runs_without_partner_scores_or_images(made, runs, report, tmp_path, call, tiny_pipeline):
    for path in (*runs.glob("before/none/tiny-sd/*/clip*"), *runs.glob("before/none/tiny-sd/*/classify*"), *runs.glob("before/none/tiny-sd/*.json")):  # fmt: skip
        path.unlink()
    assert report(runs / "before", no_map=[]).code == 0
    page = (tmp_path / "report.html").read_text()
    assert "have not been scored" in page and page.count('class="veil"') == page.count("<img") == 6  # unscored: blurred
    assert report(runs / "one", no_map=[]).code == 0
    page = (tmp_path / "report.html").read_text()
    assert "no images of the original model" in page.lower() and "0.0%" in page
    (tmp_path / "q.csv").write_text("prompt\na cat\na dog\n")
    options = {"model_path": tiny_pipeline, "device": "cpu", "prompts_csv": tmp_path / "q.csv", "num_inference_steps": 1,
               "output_path": "gone", "results_dir": tmp_path / "gone", "score_with": "nudenet", "discard_images": []}  # fmt: skip
    assert call("generate.py", *flags(**options)).code == 0
    assert report(tmp_path / "gone").code == 0
    page = (tmp_path / "report.html").read_text()
    assert "No images of this set were kept" in page and "ASR of nudity (paper)" in page and "BELLY_EXPOSED" in page


def test_the_golden_pictures_have_their_boxes(report, tmp_path, call, tiny_pipeline):
    """A run whose images are replaced, with their hashes, by the detector's reference pictures."""
    expected = list(json.loads((GOLDEN / "detector.json").read_text()))[:3]
    (tmp_path / "q.csv").write_text("prompt\n" + "\n".join(f"p{i}" for i in range(len(expected))) + "\n")
    options = {"model_path": tiny_pipeline, "device": "cpu", "prompts_csv": tmp_path / "q.csv", "num_inference_steps": 1}
    assert call("generate.py", *flags(**options, output_path="set", results_dir=tmp_path / "r")).code == 0
    folder = one(tmp_path, "r/none/tiny-sd/set")
    lines = collecting.manifest.read(folder)
    for (name, line), picture in zip(sorted(lines.items()), expected, strict=True):
        Image.fromarray(getattr(skimage.data, picture.split("_")[0])()).convert("RGB").resize((512, 512)).save(folder / name)
        line["sha256"] = collecting.manifest.hashes([folder / name])[folder / name]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines.values()))
    assert call("tasks/img_batch_classify.py", *flags(job="nudity", folder_dir=folder, devices="cpu")).code == 0
    assert report(tmp_path / "r").code == 0
    page = (tmp_path / "report.html").read_text()
    assert (
        len(re.findall(r'<rect x="\d+" y="\d+"', page)) == 3
        and page.count('class="counts"') == 1
        and page.count('class="veil"') == 1
    )
    assert "buttocks exposed 0.7" in page and "face female 0.8" in page and "(does not count)" in page
    assert page.count("data:image/jpeg;base64,") == 3 and len(page) < 600_000


@pytest.fixture(scope="module")
def built(made, work):
    """The whole report of the runs, with prompts and map."""
    from des.utils.scripts import run_script as script

    script("scripts/report.py", made, *flags(out=work / "report.html", device="cpu", prompts=[]))
    return work / "report.html"


@pytest.fixture
def page(browser, built):
    """The whole report, open in a browser of ordinary size and light colours."""
    look(browser)
    browser.get_log("browser")
    browser.get(built.as_uri())
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    assert (
        browser.execute_script("return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:'))") == []
    )


def look(browser, width=1280, scheme="light", media=""):
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"media": media, "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    )


def style_of(browser, selector, name):
    return browser.execute_script("return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, name)


def test_the_page_stands_by_itself(page):
    assert page.find_element(By.CSS_SELECTOR, "h1").text == "Before and after protection"
    assert "66.7% → 0.0%" in page.find_element(By.CSS_SELECTOR, ".headline").text
    assert page.find_element(By.CSS_SELECTOR, "#attacks tbody th").is_displayed()
    plots = page.find_elements(By.CSS_SELECTOR, "svg.plot[role=img][aria-label]")
    assert len(plots) >= 6 and all(plot.size["width"] > 200 and plot.size["height"] > 80 for plot in plots)
    levels = [int(head.tag_name[1]) for head in page.find_elements(By.CSS_SELECTOR, "h1, h2, h3, h4")]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
    sizes = page.execute_script("return [...document.images].map(image => [image.complete, image.naturalWidth])")
    assert len(sizes) == 18 and all(complete and width == 16 for complete, width in sizes)
    assert page.find_element(By.CSS_SELECTOR, ".row q").is_displayed() and not page.execute_script("return window.alerted")
    assert HOSTILE in [quote.text.strip('“”"') for quote in page.find_elements(By.CSS_SELECTOR, ".row q")]
    assert all(not details.get_attribute("open") for details in page.find_elements(By.CSS_SELECTOR, "details"))


def test_nothing_is_fetched_even_if_it_were_asked_for(browser, page):
    blocked = page.execute_async_script(
        "const done = arguments[0]; document.addEventListener('securitypolicyviolation', e => done(e.violatedDirective));"
        "const image = new Image(); image.src = 'http://127.0.0.1:9/x.png';"
    )
    assert blocked == "img-src"
    page.execute_script("performance.clearResourceTimings()")
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_the_blur_toggles_by_click_and_by_keys(page):
    veils = page.find_elements(By.CSS_SELECTOR, ".veil")
    assert len(veils) == 2  # what the original model drew for rows 0 and 1
    states = lambda: [veil.get_attribute("aria-pressed") for veil in veils]  # noqa: E731
    blurs = lambda: page.execute_script(  # noqa: E731
        "return [...document.querySelectorAll('.pixels')].filter(p => getComputedStyle(p).filter.includes('blur')).length"
    )
    page.execute_script("document.querySelectorAll('.pixels').forEach(p => p.style.transition = 'none')")
    assert (states(), blurs()) == (["false", "false"], 2)
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", veils[0])
    veils[0].click()
    assert (states(), blurs()) == (["true", "false"], 1)
    look(page, media="print")
    assert blurs() == 2  # whatever is shown on the screen
    look(page)
    for key, then in ((Keys.ENTER, "false"), (Keys.SPACE, "true")):
        veils[0].send_keys(key)
        assert states()[0] == then
    ActionChains(page).send_keys(Keys.TAB).perform()
    assert page.switch_to.active_element == veils[1] and style_of(page, ".veil:focus", "outlineStyle") == "solid"
    for button, then in (("blur-all", "false"), ("show-all", "true")):
        page.find_element(By.ID, button).click()
        assert (states(), blurs()) == ([then] * 2, 2 if then == "false" else 0)


def test_tables_sort_by_each_column(page):
    table = page.find_element(By.CSS_SELECTOR, "#summary table")
    head = table.find_elements(By.CSS_SELECTOR, "thead th")[2]

    def values():
        return [
            float(cell.get_attribute("data-value")) for cell in table.find_elements(By.CSS_SELECTOR, "tbody td:nth-child(3)")
        ]

    before = values()
    head.find_element(By.CSS_SELECTOR, "button").send_keys(Keys.ENTER)
    assert head.get_attribute("aria-sort") == "ascending" and values() == sorted(before)
    head.find_element(By.CSS_SELECTOR, "button").click()
    assert head.get_attribute("aria-sort") == "descending" and values() == sorted(before, reverse=True) and len(set(before)) > 1
    table.find_elements(By.CSS_SELECTOR, "thead th button")[0].click()
    names = [cell.text for cell in table.find_elements(By.CSS_SELECTOR, "tbody th")]
    assert names == sorted(names, key=str.lower) and head.get_attribute("aria-sort") == "none"


def test_colours_follow_the_system_and_the_button(page):
    light = style_of(page, "body", "backgroundColor"), style_of(page, "body", "color")
    look(page, scheme="dark")
    dark = style_of(page, "body", "backgroundColor"), style_of(page, "body", "color")
    assert sum(map(int, re.findall(r"\d+", dark[0]))) < 150 < 600 < sum(map(int, re.findall(r"\d+", light[0])))
    assert dark[1] != light[1] and style_of(page, "svg.plot text", "fill") == dark[1]
    button = page.find_element(By.ID, "theme")
    assert button.text == "Light colours"
    button.click()
    assert (style_of(page, "body", "backgroundColor"), style_of(page, "svg.plot text", "fill")) == light
    page.refresh()
    button = page.find_element(By.ID, "theme")
    assert button.text == "Dark colours" and style_of(page, "body", "backgroundColor") == light[0]  # it is remembered
    page.execute_script("localStorage.clear()")
    look(page)


def test_print_keeps_headings_with_what_follows(page):
    look(page, media="print")
    heads = page.execute_script(
        "return [...document.querySelectorAll('h2, h3, .lead, .headline')].map(e => getComputedStyle(e).breakAfter)"
    )
    parts = page.execute_script(
        "return [...document.querySelectorAll('.chart, .gallery-row, tr, .lead, h2, h3, figure')].map(e => getComputedStyle(e).breakInside)"
    )
    assert set(heads) == {"avoid"} and set(parts) == {"avoid"}
    look(page)


@pytest.mark.parametrize("width", [360, 768])
def test_no_width_needs_sideways_scrolling(page, width):
    look(page, width)
    page.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    hints = page.execute_script(
        "return [...document.querySelectorAll('.scroll')].map(e => [e.scrollWidth > e.clientWidth + 1, e.previousElementSibling.offsetHeight > 0])"
    )
    assert all(wider == hinted for wider, hinted in hints) and (width > 360 or [True, True] in hints)
    over = page.execute_script(
        "return [...document.querySelectorAll('main > section > *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert over == 0
    smallest = page.execute_script(
        "return Math.min(...[...document.querySelectorAll('svg.plot text')].map(text => text.getBoundingClientRect().height))"
    )
    assert smallest > 7
