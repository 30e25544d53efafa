"""Model folders as users have them: files of variants, SD3 without T5, repositories of the hub, single files, damaged indices."""

import argparse
import json
import shutil

from des.export.formats import READERS, WRITERS, load_protected, verify
from des.generation.unet_defences import check_other_unet
from des.models.checkpoints import load_checkpoint
from des.models.encoders import components_of, load_encoder, read_index, text_encoders
from des.models.loading import dtype_option
from des.models.model_files import check_variant, find_weights, model_name, split_revision
from des.models.pipelines import component_identities, encoder_modules, open_pipeline, open_refiner
from des.tables.pipeline_jobs import PipelineJobs
from des.utils.cli import add_model
from des.utils.errors import UserError

import pytest
import torch
from conftest import GOLDEN, flags, snapshot
from diffusers import DiffusionPipeline


@pytest.fixture(scope="module")
def halves(family, tmp_path_factory):
    """The tiny SDXL with files of the variant fp16 only."""
    folder = tmp_path_factory.mktemp("halves") / "sdxl"
    DiffusionPipeline.from_pretrained(family("sdxl"), **dtype_option("diffusers", torch.float16)).save_pretrained(
        folder, variant="fp16"
    )
    return folder


@pytest.fixture(scope="module")
def without_t5(family, tmp_path_factory):
    """The tiny SD3 as diffusers saves it when it was opened with text_encoder_3=None."""
    folder = tmp_path_factory.mktemp("without") / "sd_v3"
    DiffusionPipeline.from_pretrained(family("sd_v3"), text_encoder_3=None, tokenizer_3=None).save_pretrained(folder)
    assert json.loads((folder / "model_index.json").read_text())["text_encoder_3"] == [None, None]
    return folder


def protected(model, index, folder):
    """A changed encoder of a pipeline as a checkpoint."""
    generator = torch.Generator().manual_seed(index)
    state = load_encoder(str(model), index).model.state_dict()
    changed = {name: value + 0.02 * torch.randn(value.shape, generator=generator).to(value) for name, value in state.items()}
    torch.save({"model_state_dict": changed}, folder / f"c{index}.pt")
    return folder / f"c{index}.pt"


@pytest.mark.parametrize(
    ("names", "variant", "dtype", "expected"),
    [
        (["model.safetensors", "model.fp16.safetensors"], None, torch.float32, (None, "model.safetensors")),
        (["model.safetensors", "model.fp16.safetensors"], None, torch.float16, ("fp16", "model.fp16.safetensors")),
        (["model.safetensors", "model.fp16.safetensors"], "fp16", torch.float32, ("fp16", "model.fp16.safetensors")),
        (["model.safetensors", "pytorch_model.fp16.bin"], "bf16", None, (None, "model.safetensors")),
        (["model.fp16.safetensors", "config.json"], None, torch.bfloat16, ("fp16", "model.fp16.safetensors")),
        (["model.bf16.safetensors", "model.fp16.safetensors"], None, torch.bfloat16, ("bf16", "model.bf16.safetensors")),
        (["model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors"], None, None, ("fp16", "model.safetensors.index.fp16.json")),
        (["diffusion_pytorch_model.non_ema.bin", "diffusion_pytorch_model.bin"], None, None, (None, "diffusion_pytorch_model.bin")),
        (["diffusion_pytorch_model.fp16.safetensors.index.json"], None, None, ("fp16", "diffusion_pytorch_model.fp16.safetensors.index.json")),
        (["pytorch_model.bin.index.json", "pytorch_model.bin"], None, None, (None, "pytorch_model.bin")),
        (["flax_model.msgpack", "openvino_model.bin", "model.onnx", "model-00001-of-00002.safetensors"], None, None, None),
    ],
)  # fmt: skip
def test_which_weights_are_read(names, variant, dtype, expected):
    found = find_weights(names, "x", variant, dtype)
    assert (found and (found.variant, found.head)) == expected


def test_two_variants_that_cannot_be_told_apart_are_refused():
    with pytest.raises(UserError, match="only in the variants ema, fp16; choose one with --variant"):
        find_weights(["model.ema.safetensors", "model.fp16.safetensors"], "x", None, torch.float32)


def test_a_folder_with_fp16_files_only_is_read_and_cast(halves, family, tmp_path, caplog):
    caplog.set_level("INFO", "des")
    encoder = load_encoder(str(halves), 2)
    whole = load_encoder(str(family("sdxl")), 2)
    assert encoder.model.dtype == torch.float32
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(encoder.model.state_dict()[name], tensor.half().float())
    torch.save({"model_state_dict": whole.model.state_dict()}, tmp_path / "original.pt")
    with pytest.raises(UserError, match="up to rounding"):  # the unrounded original is no protected encoder
        load_checkpoint(encoder.model, tmp_path / "original.pt")
    pipe = open_pipeline(str(halves), torch.float32)
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
    found = component_identities(pipe, str(halves))
    assert found["unet"] != component_identities(open_pipeline(str(family("sdxl")), torch.float32), str(family("sdxl")))["unet"]
    with pytest.raises(UserError, match="no weights of the variant fp61; its variants: fp16"):
        open_pipeline(str(halves), torch.float32, variant="fp61")
    with pytest.raises(UserError, match="its variants: none"):
        load_encoder(str(family("sdxl")), variant="fp16")
    assert "the unet of" in caplog.text and "is read from diffusion_pytorch_model.fp16.safetensors" in caplog.text
    assert PipelineJobs("m", torch.device("cpu"), "fp16").common[:4] == ("--model_path", "m", "--variant", "fp16")


def test_the_variant_is_chosen_for_each_component(halves, family, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(family("sdxl"), mixed)
    shutil.rmtree(mixed / "vae")
    for name in ("vae", "unet"):
        shutil.copytree(halves / name, mixed / name, dirs_exist_ok=True)
    exact = open_pipeline(str(family("sdxl")), torch.float32).unet.state_dict()
    for variant, same in ((None, True), ("fp16", False)):
        opened = open_pipeline(str(mixed), torch.float32, variant=variant)
        assert all(torch.equal(opened.unet.state_dict()[name], tensor) for name, tensor in exact.items()) == same
        assert opened.text_encoder.dtype == torch.float32
        with pytest.raises(UserError, match="its UNet equals the one of"):
            check_other_unet(opened.unet, "safegen", str(halves))
    refiner = open_refiner(str(family("sdxl_refiner")), opened, "fp16")  # it has no such files
    component_identities(opened, str(mixed), refiner, str(family("sdxl_refiner")), "fp16")


@pytest.mark.parametrize("folder", ["halves", "mixed"])
def test_an_exported_pipeline_has_each_weight_once(halves, family, tmp_path, folder):
    model = halves
    if folder == "mixed":
        model = tmp_path / "mixed"
        shutil.copytree(family("sdxl"), model)
        shutil.copytree(halves, model, dirs_exist_ok=True)
        (model / "unet/flax_model.msgpack").write_bytes(b"the same weights")
    made = load_protected(str(model), {2: protected(model, 2, tmp_path)})
    WRITERS["pipeline"](made, tmp_path / "out")
    verify(made, READERS["pipeline"](made, tmp_path / "out"))
    weights = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*") if path.suffix != ".json"}
    components = {"unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model"}
    assert {name for name in weights if not name.endswith(".txt")} == {f"{name}.safetensors" for name in components}
    for dtype in (torch.float32, torch.float16):
        open_pipeline(str(tmp_path / "out"), dtype)


def test_shards_of_a_variant_are_exported_under_plain_names(family, tmp_path):
    folder = tmp_path / "sd"
    pipe = DiffusionPipeline.from_pretrained(family("sd_v1"), **dtype_option("diffusers", torch.float16))
    pipe.save_pretrained(folder, variant="fp16", max_shard_size="20KB")
    assert len(list(folder.glob("unet/*.fp16-0*"))) > 1
    made = load_protected(str(folder), {1: protected(folder, 1, tmp_path)})
    WRITERS["pipeline"](made, tmp_path / "out")
    assert not [name for name in snapshot(tmp_path / "out") if "fp16" in name]
    opened, before = open_pipeline(str(tmp_path / "out"), torch.float32), open_pipeline(str(folder), torch.float32)
    assert all(torch.equal(opened.unet.state_dict()[name], tensor) for name, tensor in before.unet.state_dict().items())


def draw(call, model, tmp_path, out="t2i", **options):
    small = {"height": 16, "width": 16, "num_inference_steps": 2, "device": "cpu", "dtype": "fp32", "results_dir": tmp_path}
    return call("generate.py", *flags(model_path=model, prompt="a photo of a dog", output_path=out, **small | options))


def test_sd3_without_t5(call, without_t5, family, tmp_path):
    """Saved without T5, and whole with --drop_t5, it draws the same image; with T5 it draws another."""
    assert draw(call, without_t5, tmp_path).code == 0
    done = draw(call, family("sd_v3"), tmp_path, drop_t5=[], out="dropped")
    assert done.code == 0, done.err
    assert draw(call, family("sd_v3"), tmp_path, out="whole").code == 0
    folders = [tmp_path / "none/sd_v3" / name for name in ("t2i", "dropped", "whole")]
    images = [next(folder.glob("*.png")).read_bytes() for folder in folders]
    assert images[0] == images[1] != images[2]
    records = [json.loads((folder / "run.json").read_text())["settings"] for folder in folders]
    assert records[0] == records[1] | {"model_path": records[0]["model_path"]}
    assert not any("3" in name for name in records[0]["components"]) and "text_encoder_3_sha256" in records[2]
    done = draw(call, family("sd_v3"), tmp_path, drop_t5=[], out="whole")
    assert done.failed_in_one_sentence, done.err
    for model, says in ((family("flux"), "--drop_t5 is for sd_v3"), (without_t5, "has no T5; leave --drop_t5 out")):
        done = draw(call, model, tmp_path, drop_t5=[])
        assert done.failed_in_one_sentence and says in done.err, done.err
    checkpoint = protected(family("sd_v3"), 3, tmp_path)
    done = draw(call, family("sd_v3"), tmp_path, drop_t5=[], training_method="des", text_encoder_3_path=checkpoint)
    assert done.failed_in_one_sentence and "only 1, 2" in done.err, done.err


@pytest.mark.parametrize("mode", ["text", "image", "inpaint"])
def test_every_mode_opens_sd3_without_t5(without_t5, mode):
    assert list(encoder_modules(open_pipeline(str(without_t5), torch.bfloat16, mode=mode))) == [1, 2]


def test_exports_of_sd3_without_t5(call, without_t5, family, tmp_path):
    checkpoint = protected(family("sd_v3"), 1, tmp_path)
    common = {"format": "pipeline", "text_encoder_path": checkpoint}
    for model, out, options in ((without_t5, "a", {}), (family("sd_v3"), "b", {"drop_t5": []})):
        done = call("scripts/export.py", *flags(model_path=model, out=tmp_path / out, **common | options))
        assert done.code == 0, done.err
        assert "text encoder 2 of the model is the original" in done.err
        assert text_encoders(str(tmp_path / out)) == {1: "text_encoder", 2: "text_encoder_2"}
        assert not list((tmp_path / out).glob("*_3"))
        code = (tmp_path / out / "README.md").read_text().split("```python\n")[1].split("```")[0]
        assert "text_encoder_3=None, tokenizer_3=None, dtype=" in code
    for options, says in (
        ({"text_encoder_3_path": checkpoint}, "--drop_t5 leaves out text encoder 3"),
        ({"format": "hf"}, "--drop_t5 goes with --format pipeline only"),
    ):
        done = call("scripts/export.py", *flags(model_path=family("sd_v3"), out=tmp_path / "c", drop_t5=[], **common | options))
        assert done.failed_in_one_sentence and says in done.err, done.err


@pytest.mark.parametrize(
    ("model", "name"),
    [("flux", "text_encoder_2"), ("sdxl", "text_encoder"), ("sdxl", "tokenizer"), ("sd_v3", "tokenizer_3"), ("sd_v3", "text_encoder_2"),
     ("sd_v3", "transformer"), ("sd_v1", "scheduler"), ("sd_v1", "vae")],
)  # fmt: skip
def test_a_pipeline_that_cannot_draw_without_a_component_is_refused(family, tmp_path, model, name):
    index = json.loads((family(model) / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {name: [None, None]}))
    if model == "sd_v1":
        shutil.copytree(family(model) / "text_encoder", tmp_path / "text_encoder")
    with pytest.raises(UserError, match=f"has no {name}, without which a .* cannot draw"):
        open_pipeline(str(tmp_path), torch.float32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ([], "it is a JSON list instead of an object"), ({}, "does not name a class"), ({"_class_name": ["StableDiffusionPipeline"]}, "does not name a class"),
        ({"_class_name": "StableDiffusionPipeline", "text_encoder": []}, "`text_encoder`"), ({"_class_name": "StableDiffusionPipeline", "unet": {}}, "`unet`"),
        ({"_class_name": "StableDiffusionPipeline", "vae": [None, "AutoencoderKL"]}, "`vae`"),
        ({"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", ["AutoencoderKL"]]}, "`vae`"),
        ({"_class_name": "StableDiffusionPipeline", "../vae": ["diffusers", "AutoencoderKL"]}, "`../vae`"),
    ],
)  # fmt: skip
def test_an_odd_index_is_one_sentence(tmp_path, change, says):
    (tmp_path / "model_index.json").write_text(json.dumps(change))
    for use in (read_index, text_encoders, components_of, lambda path: open_pipeline(path, torch.float32)):
        with pytest.raises(UserError, match=says):
            use(str(tmp_path))


@pytest.mark.parametrize("steps", [10**9, 1e9, 0, -5, "1000", True, [1000], None])
def test_training_steps_of_a_scheduler_are_checked_before_it_is_built(family, tmp_path, steps):
    shutil.copytree(family("sd_v1"), tmp_path / "m")
    file = tmp_path / "m/scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_train_timesteps": steps}))
    with pytest.raises(UserError, match=r"num_train_timesteps .* must be a whole number from 1 to 100000"):
        open_pipeline(str(tmp_path / "m"), torch.float32)


def test_a_single_file_is_named_with_the_line_that_converts_it(call, tmp_path):
    path = tmp_path / "v1-5.safetensors"
    path.write_bytes(b"x")
    for done in (
        draw(call, path, tmp_path),
        call(
            "save_codebook.py", *flags(model_path=path, device="cpu", csv_path=GOLDEN / "A/safe.csv", save_dir=tmp_path / "cb")
        ),
    ):
        assert done.failed_in_one_sentence and "is a single file" in done.err, done.err
        assert f'from_single_file("{path}").save_pretrained("FOLDER")' in done.err


@pytest.mark.parametrize(
    "argv", ["--revision v1 --model_path o/m", "--model_path o/m --revision v1", "--model_path o/m@v1 --revision v1"]
)
def test_model_path_and_revision_are_joined_in_any_order(argv):
    parser = argparse.ArgumentParser()
    add_model(parser)
    args = parser.parse_args(argv.split())
    assert args.model_path == "o/m@v1" and split_revision(args.model_path) == ("o/m", "v1")
    assert model_name("o/m@refs/pr/1") == "m"


def test_a_folder_has_no_revision(family, tmp_path):
    with pytest.raises(UserError, match="is a folder, but only models of the hub have revisions"):
        load_encoder(f"{family('sd_v1')}@main")
    shutil.copytree(family("sd_v1"), tmp_path / "a@b")
    assert read_index(str(tmp_path / "a@b")) and model_name(str(tmp_path / "a@b")) == "a@b"


def test_a_complete_cache_serves_each_revision_without_a_connection(hub, halves, family, tmp_path, call):
    hub("owner/model", {"main": family("sdxl"), "halves": halves})
    whole, rounded = (open_pipeline(f"owner/model{suffix}", torch.float32) for suffix in ("", "@halves"))
    for pipe, source in ((whole, family("sdxl")), (rounded, halves)):
        expected = open_pipeline(str(source), torch.float32)
        for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
            state = getattr(pipe, name).state_dict()
            assert all(torch.equal(state[key], tensor) for key, tensor in getattr(expected, name).state_dict().items())
        where = "owner/model" + ("@halves" if pipe is rounded else "")
        assert component_identities(pipe, where) == component_identities(expected, str(source))
    with pytest.raises(UserError, match="owner/model@other could not be loaded"):
        load_encoder("owner/model@other")
    check_variant("owner/model@halves", "fp16")
    done = draw(call, "owner/model", tmp_path, revision="halves")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "none/model/t2i/run.json").read_text())
    assert record["settings"]["model_path"] == "owner/model@halves"
    done = call("scripts/verify.py", tmp_path / "none/model/t2i", "--device", "cpu")
    assert done.code == 0 and "the same pixels" in done.out, done.err
