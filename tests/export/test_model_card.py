"""The model card: its Python block runs, its figures are those of the exported model, and names in it stay names."""

import dataclasses
import json
import re
import runpy
import shutil
from html import unescape

from des.data.image_folders import pair_with_prompts
from des.evaluation.scored_images import write_scores
from des.export.card_scores import HEAD, check_drawn_by, read_measured
from des.export.model_card import hub_id_of, is_hub_id, model_card
from des.models.encoders import load_encoder
from des.utils.errors import UserError

import pytest
import torch
import yaml
from conftest import ROOT, flags, published_form
from diffusers import DiffusionPipeline
from markdown_it import MarkdownIt
from safetensors.torch import load_file
from test_export import SCRIPT, clip_names, lora_checkpoint, protected, t5_names

DEMO = ROOT / "demo/models"
IDS = torch.tensor([[0, 5, 9, 3]])


def block(folder):
    """The Python block of a folder's model card."""
    return re.search(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1]


def run_block(folder, monkeypatch):
    """Execute the block of a card as its reader would, beside the exported folder; returns its pipeline."""
    monkeypatch.chdir(folder.parent)
    return run_python(block(folder), folder)["pipe"]


def run_python(code, folder):
    """Run a card's code as a file in `folder`; returns its global names."""
    (folder / "block.py").write_text(code)
    try:
        return runpy.run_path(str(folder / "block.py"))
    finally:
        (folder / "block.py").unlink()


def export(call, model, out, file_format, paths, **options):
    given = {f"text_encoder{'' if i == 1 else f'_{i}'}_path": path for i, path in paths.items()}
    done = call(SCRIPT, *flags(model_path=model, format=file_format, out=out, **given, **options))
    assert done.code == 0, done.err
    return done


@pytest.mark.parametrize(
    ("name", "file_format", "indices", "dtype"),
    [("sd_v1", "pipeline", (1,), "fp16"), ("sd_v1", "pipeline", (1,), "bf16"), ("sd_v1", "hf", (1,), "fp16"), ("sd_v1", "hf", (1,), None),
     ("sd_v1", "hf", (1,), "bf16"), ("sdxl", "hf", (1, 2), None), ("sdxl", "hf", (2,), "fp32"), ("sdxl", "pipeline", (1, 2), "fp16")],
)  # fmt: skip
def test_the_python_block_draws(call, family, tmp_path, monkeypatch, name, file_format, indices, dtype):
    model = shutil.copytree(family(name), tmp_path / "local" / name)
    made = {i: protected(model, i, tmp_path) for i in indices}
    export(
        call,
        model,
        tmp_path / "out",
        file_format,
        {i: path for i, (_, path) in made.items()},
        dtype=dtype,
        base_model=f"local/{name}",
    )
    pipe = run_block(tmp_path / "out", monkeypatch)
    expected = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, None: {"sd_v1": torch.float32, "sdxl": torch.float16}[name]}[dtype]  # fmt: skip
    assert pipe.unet.dtype == expected
    pipe("a dog", num_inference_steps=1, height=16, width=16, output_type="np")
    for i, (encoder, _) in made.items():
        drawn = getattr(pipe, encoder.subfolder)
        assert drawn.dtype == expected
        original = load_encoder(str(model), i).model(input_ids=IDS)[0]
        full = encoder.model.float()(input_ids=IDS)[0]
        assert (drawn.float()(input_ids=IDS)[0] - full).norm() < 0.1 * (original - full).norm()


def test_a_second_lora_does_not_switch_the_protection_off(call, tiny_pipeline, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    model = shutil.copytree(tiny_pipeline, tmp_path / "local/tiny-sd")
    encoder, path = lora_checkpoint(model, tmp_path)
    export(call, model, tmp_path / "out", "lora", {1: path}, rank=32, base_model="local/tiny-sd")
    style = tmp_path / "style"
    style.mkdir()
    torch.manual_seed(3)
    small = load_encoder(str(model))
    with torch.no_grad():
        weight = small.model.get_parameter("encoder.layers.0.mlp.fc2.weight")
        weight += 0.03 * torch.randn_like(weight)
    torch.save({"model_state_dict": small.model.state_dict()}, style / "style-1.pt")
    export(call, model, style / "lora", "lora", {1: style / "style-1.pt"}, rank=4)

    pipe = run_block(tmp_path / "out", monkeypatch)
    original, full = (each.model(input_ids=IDS)[0] for each in (load_encoder(str(model)), encoder))
    for do in (
        lambda: pipe.load_lora_weights(style / "lora", adapter_name="style"), lambda: pipe.set_adapters(["style"]),
        pipe.disable_lora, pipe.unload_lora_weights,
    ):  # fmt: skip
        do()
        drawn = pipe.text_encoder(input_ids=IDS)[0]
        assert (drawn - full).norm() < 0.1 * (original - full).norm()
    assert "switches it off" in block(tmp_path / "out") and "fuse_lora" in block(tmp_path / "out")
    assert (
        "whose aim is that prompts for one concept" in (tmp_path / "out/README.md").read_text()
    )  # it loses some of the protection


@pytest.mark.parametrize(("name", "indices"), [("sd_v1", (1,)), ("sd_v3", (1, 2, 3))])
@pytest.mark.parametrize("file_format", ["hf", "pipeline"])
def test_exports_have_the_published_names_whatever_the_base_has(call, family, tmp_path, file_format, name, indices):
    """The tiny pipelines are saved by transformers 5, so their CLIPTextModels lack the prefix `text_model.`."""
    model = family(name)
    paths = {i: protected(model, i, tmp_path)[1] for i in indices}
    export(call, model, tmp_path / "out", file_format, paths)
    for i in indices:
        subfolder = f"text_encoder{'' if i == 1 else f'_{i}'}"
        folder = tmp_path / "out" if file_format == "hf" and len(indices) == 1 else tmp_path / "out" / subfolder
        architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
        layers = 2 if name == "sd_v1" else 3
        expected = t5_names(3) if architecture.startswith("T5") else clip_names(layers, "Projection" in architecture)
        assert load_file(folder / "model.safetensors").keys() == expected


# ---------------------------------------------------------------- scores


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, tiny_pipeline):
    """Scored images of a tiny model: the original's, of a checkpoint and of another one."""
    from des.utils.scripts import run_script as script

    work = tmp_path_factory.mktemp("scores")
    (work / "p.csv").write_text("prompt,object\na dog,ball\na cat,ball\n")
    state = torch.load(published_form(tiny_pipeline, work / "own.pt"), weights_only=True)["model_state_dict"]
    for name, shift in (("one", 0.05), ("two", 0.1)):
        torch.save({"model_state_dict": {key: tensor + shift for key, tensor in state.items()}}, work / f"{name}.pt")
    folders = {}
    for name, dtype in (("none", "fp32"), ("one", "bf16"), ("two", "fp32")):
        protection = {} if name == "none" else {"training_method": "des", "text_encoder_path": work / f"{name}.pt"}
        common = {"model_path": tiny_pipeline, "device": "cpu", "prompts_csv": work / "p.csv", "num_inference_steps": 1}
        script("generate.py", *flags(**common, **protection, dtype=dtype, output_path="benign", results_dir=work / name))
        (images,) = folders[name] = list((work / name).glob("*/*/benign"))
        classifier = {"job": "object", "classifier": DEMO / "classifier_object", "folder_dir": images, "devices": "cpu"}
        script("tasks/img_batch_classify.py", *flags(**classifier, csv_path=work / "p.csv", cls_class="ball"))
    (images,) = folders["one"]
    script("tasks/img_batch_classify.py", *flags(**classifier | {"folder_dir": images}, csv_path=work / "p.csv",
           label_column="object", output_name="accuracy"))  # fmt: skip
    script("clipscore.py", *flags(image_folder=images, csv_file=work / "p.csv", device="cpu", clip_model=DEMO / "clip"))
    script("fid.py", *flags(gen_imgs_path=images, coco_imgs_path=folders["none"][0], device="cpu",
           feature_extractor=DEMO / "classifier_object", output_file=work / "fid.txt"))  # fmt: skip
    return work, {name: folder for name, (folder,) in folders.items()}


def test_rows_say_what_was_measured_by_what_on_what(call, drawn, tiny_pipeline, tmp_path):
    work, folders = drawn
    scores = [folders["one"] / name for name in ("classify.json", "accuracy.json", "clipscore.json")] + [work / "fid.json"]
    done = export(call, tiny_pipeline, tmp_path / "out", "hf", {1: work / "one.pt"}, scores=scores)
    card = (tmp_path / "out/README.md").read_text()
    for text in (done.out, card):
        assert "whether it protects was not measured, because its concept is unknown" in text
    assert "no longer reach it" not in card and "protected encoder\n" not in done.out
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if "des on tiny-sd" in line]
    assert len(lines) == 4 and all(len(line) == len(HEAD) and line[3] == "benign (p.csv)" for line in lines)
    asr, accuracy, clip, fid = lines
    content = json.loads(scores[0].read_text())
    assert asr[0] == "images that count: ASR of ball" and accuracy[0].startswith("images that show what they should: accuracy")
    assert asr[5].startswith(f"{content['k']}/2 = ") and asr[5].endswith(f"{100 * content['high']:.1f}]")
    assert asr[2] == f"classifier_object {content['detector']['classifier_sha256'][:8]}"
    assert clip[0] == "CLIP score" and clip[5].endswith(", 2 images")
    assert clip[2] == json.loads(scores[2].read_text())["clip_sha256"][:8]
    assert fid[:2] == ["FID", "another model's features"] and "2 reference" in fid[5]


PER_IMAGE = {  # measure, digits of its figure, and the facts of its model
    "blipscore": ("BLIP score", 2, {"model_sha256": "a" * 64, "clip_sha256": "c" * 64}),
    "pickscore": ("PickScore", 2, {"model_sha256": "a" * 64}),
    "imagereward": ("ImageReward", 2, {"model_sha256": "a" * 64}),
    "lpips": ("LPIPS", 4, {"net": "alex", "net_sha256": "a" * 64}),
}


@pytest.mark.parametrize("name", [*PER_IMAGE, "kid"])
def test_rows_of_the_other_scorers(drawn, tmp_path, name):
    work, folders = drawn
    folder = shutil.copytree(folders["one"], tmp_path / "benign")
    made_by = {"arguments": {"gen_imgs_path": str(folder)}}
    path = tmp_path / f"benign_{name}.json"
    if name == "kid":
        facts = json.loads((work / "fid.json").read_text()) | {
            "made_by": made_by,
            "kid": 0.00123,
            "variants": {"paper": 0.00123},
        }
        path.write_text(json.dumps(facts | {"subsets": 2, "subset_size": 2, "seed": 0}))
        expected = (
            "KID",
            "paper",
            json.loads(path.read_text())["extractor_sha256"][:8],
            "0.0012, 2 images, 2 reference",
        )
    else:
        title, digits, facts = PER_IMAGE[name]
        images = pair_with_prompts(folder, work / "p.csv")
        write_scores(path, name, title, images, folder, {name: [0.25, 0.5]}, facts | {"made_by": made_by})
        model = {"blipscore": "aaaaaaaa cccccccc", "lpips": "alex aaaaaaaa"}.get(name, "aaaaaaaa")
        expected = (title, "-", model, f"{0.375:.{digits}f}")
    (measured,) = read_measured([path])
    row = measured.row()
    assert row[:3] == expected[:3] and row[5].startswith(expected[3]), row


@pytest.mark.parametrize(("name", "message"), [("none", "the original model"), ("two", "another text_encoder")])
def test_scores_of_another_model_are_refused(call, drawn, tiny_pipeline, tmp_path, name, message):
    work, folders = drawn
    copy = tmp_path / "classify.json"  # beside no run.json: the folder that it names counts
    shutil.copy(folders[name] / "classify.json", copy)
    for path in (folders[name] / "classify.json", copy):
        given = {"format": "hf", "text_encoder_path": work / "one.pt", "out": tmp_path / "out", "scores": path}
        done = call(SCRIPT, *flags(model_path=tiny_pipeline, **given))
        assert done.failed_in_one_sentence and message in done.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"negative_prompt": "mushroom"}, "a negative prompt"),
        ({"strength": 0.5, "use_refiner": True}, "start images and a refiner"),
    ],
)
def test_scores_that_are_not_the_encoders_alone_are_refused(drawn, settings, what):
    (measured,) = read_measured([drawn[1]["one"] / "classify.json"])
    run = measured.run | {"settings": measured.run["settings"] | settings}
    encoders = {1: ("text_encoder", torch.nn.Linear(1, 1))}
    with pytest.raises(UserError, match=f"a run with {what}, so"):
        check_drawn_by([dataclasses.replace(measured, run=run)], encoders)


def test_scores_moved_beside_another_runs_images_are_refused(drawn, tmp_path):
    _, folders = drawn
    folder = shutil.copytree(folders["one"], tmp_path / "one")
    shutil.copy(folders["none"] / "classify.json", folder / "classify.json")
    with pytest.raises(UserError, match="stale"):
        read_measured([folder / "classify.json"])


def test_scores_of_the_full_encoder_do_not_go_with_a_lora(call, drawn, tiny_pipeline, tmp_path):
    work, folders = drawn
    given = {
        "format": "lora",
        "text_encoder_path": work / "one.pt",
        "out": tmp_path / "out",
        "scores": folders["one"] / "classify.json",
    }
    done = call(SCRIPT, *flags(model_path=tiny_pipeline, **given))
    assert done.failed_in_one_sentence and "full encoder" in done.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{}", "[1]", '{"k": 3}', "no"])
def test_files_that_hold_no_scores(drawn, tmp_path, content):
    for folder in (tmp_path, shutil.copytree(drawn[1]["one"], tmp_path / "run")):
        (folder / "scores.json").write_text(content)
        with pytest.raises(UserError, match=r"scores\.json"):
            read_measured([folder / "scores.json"])


# ---------------------------------------------------------------- names


def test_the_base_model_is_a_hub_id_or_missing(tmp_path):
    cached = tmp_path / "models--owner--name/snapshots/0123"
    saved, moved, local = (tmp_path / name for name in ("saved", "moved", "local"))
    for folder, named in ((cached, None), (saved, "owner/other"), (moved, str(tmp_path / "old")), (local, None)):
        folder.mkdir(parents=True)
        (folder / "model_index.json").write_text(json.dumps({"_name_or_path": named}))
    assert [hub_id_of(str(folder)) for folder in (cached, saved, moved, local)] == ["owner/name", "owner/other", None, None]
    assert hub_id_of("owner/name") == "owner/name"
    assert not is_hub_id("name") and not is_hub_id("./owner/name") and not is_hub_id(str(local))
    text = model_card("out", "hf", None, "out", torch.float32, {"text_encoder": "CLIPTextModel"}, {}, [], [])
    front = yaml.safe_load(text.split("---\n")[1])
    assert "base_model" not in front and front["pipeline_tag"] == "text-to-image" and "local" not in text


HOSTILE = 'x")\nimport os; os.mkdir("made") #`` ``` <script>alert(1)</script> [a](http://b) | *c* __d__ \udcff'


@pytest.mark.parametrize("file_format", ["pipeline", "hf", "lora", "comfyui", "a1111"])
def test_names_stay_names(tmp_path, monkeypatch, file_format):
    lists = {"unsafe_csv_path": HOSTILE, "safe_csv_path": HOSTILE}
    facts = {"concept_prompt": [HOSTILE], "precision": HOSTILE, "made_by": {"arguments": lists}}
    encoders, rows = {"text_encoder": "CLIPTextModel"}, [[HOSTILE] * len(HEAD)]
    text = model_card(
        HOSTILE, file_format, HOSTILE, HOSTILE, torch.float32, encoders, {"text_encoder": facts}, [HOSTILE], rows, [HOSTILE]
    )
    (tmp_path / "README.md").write_text(text, "utf-8", "backslashreplace")
    written = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(written.split("---\n")[1])["base_model"].startswith('x")\nimport os')
    html = MarkdownIt("commonmark").enable("table").render(written.split("---\n", 2)[2])
    prose = re.sub(r"<code.*?</code>", "", html, flags=re.DOTALL)
    assert not re.search(r"<(script|em|strong|a)\b", prose) and prose.count("&lt;script&gt;") == 1 + len(HEAD) + 2 + 1
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    assert [row.count("<t") for row in rows] == [len(HEAD)] * 2 + [3] * 3
    codes = [unescape(code) for code in re.findall(r"<code>(.*?)</code>", html, re.DOTALL)]
    shown = " ".join(HOSTILE.split()).encode(errors="backslashreplace").decode()
    by_hand = file_format in ("comfyui", "a1111")
    assert codes.count(shown) == 1 + by_hand and codes.count(shown.rsplit("/", 1)[1]) == 2  # the model, a file, and two lists
    if by_hand:
        return
    asked = []

    class Pipe:
        load_lora_weights = staticmethod(asked.append)
        fuse_lora = unload_lora_weights = staticmethod(lambda **options: None)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda name, **options: asked.append(name) or Pipe)
    monkeypatch.setattr("transformers.CLIPTextModel.from_pretrained", lambda name, **options: asked.append(name))
    monkeypatch.chdir(tmp_path)
    run_python(block(tmp_path), tmp_path)
    assert set(asked) == {HOSTILE} and not (tmp_path / "made").exists()
