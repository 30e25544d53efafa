"""What decides an image: schedulers built from incomplete files, and the record of a run's model (components, format, moves)."""

import json
import os
import shutil
import subprocess
import sys

from des.data.run_record import Sampling, claim
from des.models import identity
from des.models.identity import scheduler_sha256, sha256_of, weight_files
from des.models.pipelines import DIFFUSION, as_scheduler, component_identities, open_pipeline, open_refiner
from des.utils.errors import UserError
from des.utils.files import sha256_file, sha256_texts

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, flags, snapshot
from diffusers import StableDiffusionPipeline

PIPELINE = ROOT / "demo/models/pipeline"
SETTLED = ("clip_sample", "set_alpha_to_one", "steps_offset")  # published files say False, False, 1
FILE = json.loads((PIPELINE / "scheduler/scheduler_config.json").read_text())


@pytest.fixture(scope="module")
def parts():
    return open_pipeline(str(PIPELINE), torch.float32).components


def opened(parts, source, config):
    """The scheduler of class `source` as a pipeline that reads `config` from a file ends up with it."""
    scheduler = getattr(diffusers, source).from_config(config | {"_class_name": source})
    return StableDiffusionPipeline(**parts | {"scheduler": scheduler}, requires_safety_checker=False).scheduler


@pytest.mark.parametrize("source", DIFFUSION.values())
def test_an_incomplete_scheduler_file_equals_its_complete_form(parts, source):
    own = {name: value for name, value in vars(getattr(diffusers, source)().config).items() if not name.startswith("_")}
    plain = {name: FILE[name] for name in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}
    for target in (getattr(diffusers, name) for name in DIFFUSION.values()):
        # Without what its class lacks: the published values. Without what its class has: the class's own values.
        whole = opened(
            parts, source, FILE | {"timestep_spacing": "leading"} | dict.fromkeys(SETTLED, False) | {"steps_offset": 1}
        )
        for dropped in [(name,) for name in SETTLED if name not in own] + [("clip_sample",), ("steps_offset",)]:
            config = {
                name: value for name, value in dict(whole.config).items() if name not in (*dropped, "_use_default_values")
            }
            assert scheduler_sha256(as_scheduler(opened(parts, source, config), target)) == scheduler_sha256(
                as_scheduler(whole, target)
            ), (dropped, target)
        bare = opened(parts, source, plain)
        saved = {name: value for name, value in json.loads(bare.to_json_string()).items() if name != "_class_name"}
        again, first = (as_scheduler(opened(parts, source, config), target) for config in (saved, plain))
        assert scheduler_sha256(again) == scheduler_sha256(first), target
        assert first.config.timestep_spacing == own["timestep_spacing"] and not first.config.get("clip_sample")


@pytest.mark.parametrize(("source", "target"), [("PNDMScheduler", None), ("DPMSolverMultistepScheduler", "ddim"), ("EulerDiscreteScheduler", "ddpm")])  # fmt: skip
def test_a_file_without_clip_sample_draws_the_same_images(tmp_path, source, target):
    images = []
    for missing in ((), ("clip_sample", "set_alpha_to_one")):
        folder = tmp_path / f"without{len(missing)}"
        shutil.copytree(PIPELINE, folder)
        config = {name: value for name, value in FILE.items() if name not in missing} | {"_class_name": source}
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
        index = json.loads((PIPELINE / "model_index.json").read_text()) | {"scheduler": ["diffusers", source]}
        (folder / "model_index.json").write_text(json.dumps(index))
        pipe = open_pipeline(str(folder), torch.float32, scheduler=target)
        generator = torch.Generator().manual_seed(1)
        images.append(pipe("a red mushroom", num_inference_steps=3, generator=generator, output_type="np").images)
    assert np.array_equal(*images) and images[0].std() > 0.01


@pytest.fixture
def model(family, tmp_path):
    return shutil.copytree(family("sd_v1"), tmp_path / "m/tiny")


@pytest.fixture
def generate(call, tmp_path, monkeypatch, model):
    """Draw with the tiny pipeline in `tmp_path`, with changed options."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.csv").write_text("prompt\na grey cat\na red kettle\n")

    def run(**changes):
        options = {"model_path": model, "device": "cpu", "prompts_csv": "p.csv", "output_path": "t2i",
                   "num_inference_steps": 2} | changes  # fmt: skip
        return call("generate.py", *flags(**options))

    return run


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def exchange(model, family, part):
    """Put another component of the same shapes into a pipeline's folder."""
    if part == "tokenizer":
        edit_json(model / "tokenizer/tokenizer_config.json", pad_token="!")
    elif part == "scheduler":
        edit_json(model / "scheduler/scheduler_config.json", timestep_spacing="trailing")
    elif part == "text_encoder":
        edit_json(model / "text_encoder/config.json", hidden_act="gelu")
    elif part == "vae's configuration":
        edit_json(model / "vae/config.json", scaling_factor=0.5)
    else:
        module = getattr(open_pipeline(str(model), torch.float32), part)
        with torch.no_grad():
            next(module.parameters()).add_(0.01)
        module.save_pretrained(model / part)


@pytest.mark.parametrize("part", ["unet", "vae", "vae's configuration", "tokenizer", "text_encoder", "scheduler"])
def test_a_component_exchanged_in_mid_run_is_refused_by_name(generate, family, model, tmp_path, part):
    assert generate(end_idx=1).code == 0
    before = snapshot(tmp_path / "results")
    exchange(model, family, part)
    done = generate()
    assert done.failed_in_one_sentence, done.err
    name = "scheduler_sha256" if part == "scheduler" else f"component {part.split(chr(39))[0]} "
    assert f"with different settings: {name}" in done.err and "tiny" in done.err
    assert snapshot(tmp_path / "results") == before


def test_a_moved_model_and_a_spelled_out_scheduler_are_the_same(generate, model, tmp_path):
    config = model / "scheduler/scheduler_config.json"
    whole = json.loads(config.read_text())
    config.write_text(json.dumps({name: value for name, value in whole.items() if name != "steps_offset"}))
    assert generate(end_idx=1).code == 0
    folder = tmp_path / "results/none/tiny"
    config.write_text(json.dumps(whole))
    (tmp_path / "elsewhere").mkdir()
    model.rename(tmp_path / "elsewhere/tiny")
    done = generate(model_path="elsewhere/tiny/")
    assert done.code == 0 and "1 images to draw" in done.err and "1 already done" in done.err, done.err
    record = json.loads((folder / "t2i/run.json").read_text())
    assert record["format"] == 2 and record["settings"]["model_path"] == str(model)
    assert {"pipeline", "unet", "vae", "tokenizer", "text_encoder"} == record["settings"]["components"].keys()
    assert "0 images to draw" in generate(model_path=tmp_path / "elsewhere/tiny").err


def make_old(folder):
    """Rewrite a run's files as they were before run.json had a format."""
    record = json.loads((folder / "run.json").read_text())
    del record["format"], record["settings"]["components"], record["settings"]["scheduler_sha256"]
    (folder / "run.json").write_text(json.dumps(record))
    digest = sha256_texts([json.dumps(record["settings"], sort_keys=True)])
    lines = [json.loads(line) | {"settings_sha256": digest} for line in (folder / "manifest.jsonl").read_text().splitlines()]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_records_of_the_first_format_are_continued_and_verified(generate, call, tmp_path):
    assert generate(end_idx=1).code == 0
    folder = tmp_path / "results/none/tiny/t2i"
    make_old(folder)
    assert generate(seed=1).failed_in_one_sentence
    done = generate()
    assert done.code == 0 and "1 images to draw" in done.err and "1 already done" in done.err, done.err
    assert "format" not in json.loads((folder / "run.json").read_text())
    done = call("scripts/verify.py", folder, "--device", "cpu", "--sample", 1)
    assert done.code == 0 and "the same pixels" in done.out, done.err
    edit_json(folder / "run.json", format=99)
    for done in (generate(), call("scripts/verify.py", folder, "--device", "cpu")):
        assert done.failed_in_one_sentence and "later version" in done.err


def test_the_refiner_is_part_of_the_record(family, tmp_path):
    pipe = open_pipeline(str(family("sdxl")), torch.float32)
    folder = str(family("sdxl_refiner"))
    found = component_identities(pipe, str(family("sdxl")), open_refiner(folder, pipe), folder)
    assert {"refiner_unet", "refiner_pipeline", "refiner_scheduler", "tokenizer_2", "text_encoder_2"} <= found.keys()
    assert not {"refiner_vae", "refiner_text_encoder_2"} & found.keys()  # the base's
    assert found["refiner_unet"] != found["unet"]


def test_options_that_decide_no_pixel_are_in_no_record():
    import generate

    args = generate.parse_args(["--prompt", "a", "--output_path", "x", "--device", "cpu"])
    args.num_inference_steps, args.guidance_scale = 2, 3.0
    first = Sampling.of(vars(args))
    args.some_new_option = "x"
    assert Sampling.of(vars(args)) == first
    args.deterministic = True
    assert Sampling.of(vars(args)) != first


def test_weight_files_are_those_that_diffusers_reads(family, tmp_path):
    unet = diffusers.UNet2DConditionModel.from_pretrained(family("sd_v1"), subfolder="unet")
    first = unet.conv_in.bias.detach().clone()

    def save(value, **options):
        with torch.no_grad():
            unet.conv_in.bias.fill_(value)
        unet.save_pretrained(tmp_path, **options)

    def read(variant=None):
        model = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, variant=variant)
        return model.conv_in.bias[0].item()

    def named(variant=None):
        return {path.name for path in weight_files(tmp_path, variant)}

    save(1, safe_serialization=False)
    assert read() == 1 and named() == {"diffusion_pytorch_model.bin"}
    save(2)
    assert read() == 2 and named() == named("fp16") == {"diffusion_pytorch_model.safetensors"}
    save(3, variant="fp16")
    assert read("fp16") == 3 and named("fp16") == {"diffusion_pytorch_model.fp16.safetensors"}
    (tmp_path / "single").mkdir()
    shutil.copy(tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "single")
    save(4, max_shard_size="20KB")
    shutil.copy(tmp_path / "single/diffusion_pytorch_model.safetensors", tmp_path)
    assert read() == 4 and len(named()) > 1 and "diffusion_pytorch_model.safetensors" not in named()
    assert first.numel()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache for files of any size, and a list of the files that were hashed."""
    hashed = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "CACHED_FROM", 0)
    monkeypatch.setattr(identity, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    return hashed


def test_hashes_are_remembered_until_the_file_changes(cache, tmp_path):
    file, aged = tmp_path / "w", 10**18
    for content in (b"one", b"two"):  # of one size and modification time
        file.write_bytes(content)
        os.utime(file, ns=(aged, aged))
        assert sha256_of(file) == sha256_of(file) == sha256_file(file)
    assert len(cache) == 2
    (tmp_path / "moved").write_bytes(b"six")
    os.utime(tmp_path / "moved", ns=(aged, aged))
    (tmp_path / "moved").rename(file)
    assert sha256_of(file) == sha256_file(file) and len(cache) == 3
    file.write_bytes(b"new")  # just now: it may change again within the resolution of time stamps
    assert sha256_of(file) == sha256_of(file) and len(cache) == 5
    assert [path.name for path in (tmp_path / "cache/des").iterdir()] == ["sha256.json"]


@pytest.mark.parametrize("fault", ["a file in its place", "no JSON", "another JSON", "odd entries"])
def test_a_cache_that_cannot_be_used_is_no_error(cache, tmp_path, fault):
    file = tmp_path / "w"
    file.write_bytes(b"one")
    os.utime(file, ns=(10**18, 10**18))
    if fault == "a file in its place":
        (tmp_path / "cache").write_text("")
    else:
        (tmp_path / "cache/des").mkdir(parents=True)
        content = {"no JSON": "{", "another JSON": "[1]", "odd entries": json.dumps({str(file): "x"})}[fault]
        (tmp_path / "cache/des/sha256.json").write_text(content)
    assert sha256_of(file) == sha256_file(file)
    assert sha256_of(file) == sha256_file(file) and len(cache) == (2 if fault == "a file in its place" else 1)


def test_blobs_of_the_hub_cache_are_named_by_their_hash(cache, tmp_path):
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"one")
    (tmp_path / "w").symlink_to(blob)
    assert sha256_of(tmp_path / "w") == "ab" * 32 and not cache
    shutil.move(blob, tmp_path / "elsewhere")
    (tmp_path / "v").symlink_to(tmp_path / "elsewhere")
    assert sha256_of(tmp_path / "v") == sha256_file(tmp_path / "elsewhere")


def test_a_run_that_failed_before_its_first_image_binds_no_other(tmp_path):
    common = {"folder": tmp_path, "prompts": ["a dog", "a cat"], "applied": {}, "truncated": {}, "made_by": {"arguments": {}}}
    claim(**common, keys=[(0, 0), (1, 0)], settings={"dtype": "fp16"})
    code = "import sys; from pathlib import Path; from des.utils.locks import locked\n"
    code += f"with locked(Path({str(tmp_path)!r}) / '.rows.lock', 'rows', 1, 1): print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"  # a shard of the first run, which has drawn no image yet
    with pytest.raises(UserError, match="different settings"):
        claim(**common, keys=[(0, 0)], settings={"dtype": "fp32"})
    other.communicate()
    claim(**common, keys=[(0, 0)], settings={"dtype": "fp32"})
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["settings"] == {"dtype": "fp32"} and record["claimed"] == [[[0, 1]]]
    claim(**common, keys=[(1, 0)], settings={"dtype": "fp32"})  # a second shard with the same settings
    assert json.loads((tmp_path / "run.json").read_text())["claimed"] == [[[0, 2]]]
    (tmp_path / "run.json").write_text("{")
    claim(**common, keys=[(0, 0)], settings={"dtype": "fp16"})
    (tmp_path / "x_none_0p.png").touch()
    with pytest.raises(UserError, match="different settings"):
        claim(**common, keys=[(0, 0)], settings={"dtype": "fp32"})


def test_a_half_precision_folder_is_not_completed_with_another_torch(tmp_path):
    """The record's setting, or in records of earlier versions the version that drew the images."""
    record = {"folder": tmp_path, "prompts": ["a dog"], "applied": {}, "keys": [(0, 0)], "truncated": {}}
    bf16, made_by = {"dtype": "bf16"}, {"versions": {"torch": "2.9.1+cpu"}, "arguments": {}}
    for recorded in (bf16 | {"torch": "2.9.1"}, bf16):
        for path in (tmp_path / "run.json", tmp_path / "x_none_0p.png"):
            path.unlink(missing_ok=True)
        claim(**record, settings=recorded, made_by=made_by)
        (tmp_path / "x_none_0p.png").touch()
        claim(**record, settings=bf16 | {"torch": "2.9.1"}, made_by=made_by)
        with pytest.raises(UserError, match=r"different settings: torch \(2\.9\.1, now 2\.14\.1\)"):
            claim(**record, settings=bf16 | {"torch": "2.14.1"}, made_by=made_by)
    (tmp_path / "run.json").unlink()
    (tmp_path / "x_none_0p.png").unlink()
    for made_by["versions"]["torch"] in ("2.9.1", "2.14.1"):
        claim(**record, settings={"dtype": "fp32"}, made_by=made_by)
