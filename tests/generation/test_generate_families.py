"""generate.py's options over the pipeline classes: samplers, dtypes, refiner, image to image, inpainting, several images a row."""

import contextlib
import json
import shutil

from des.data.image_folders import pair_with_prompts
from des.data.run_record import Sampling
from des.generation.sampler import check_refiner
from des.models import pipelines
from des.models.checkpoints import fingerprint, published_names
from des.models.encoders import load_encoder
from des.models.families import FAMILIES
from des.models.pipelines import dtype_for, encoder_modules, open_pipeline, open_refiner, protect, text_encoder
from des.utils.errors import UserError

import numpy as np
import pytest
import torch
from conftest import drawn, flags, snapshot
from PIL import Image

NAMES = ("sd_v1", "sd_v2", "sdxl", "sd_v3", "flux")
PROMPTS = ["a photo of a dog", "two red buses", "a kite"]


@pytest.fixture
def generate(call, tmp_path, monkeypatch, family):
    """Draw small images with a tiny pipeline."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.csv").write_text("prompt\n" + "\n".join(PROMPTS) + "\n")

    def run(name, **changes):
        common = {"model_path": family(name), "device": "cpu", "prompts_csv": "p.csv", "output_path": "t2i"}
        small = {"height": 16, "width": 16, "num_inference_steps": 2}
        return drawn(call("generate.py", *flags(**common | small | changes)))

    return run


def record(tmp_path, name, results="results"):
    return json.loads((tmp_path / f"{results}/none/{name}/t2i/run.json").read_text())["settings"]


def pixels(tmp_path, name, results="results"):
    files = sorted((tmp_path / f"{results}/none/{name}/t2i").glob("*.png"))
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in files])


@pytest.mark.parametrize(
    ("name", "scheduler", "dtype", "guidance"),
    [
        ("sd_v1", "DDIMScheduler", "fp32", 7.5), ("sd_v2", "EulerDiscreteScheduler", "fp32", 7.5), ("sdxl", None, "fp32", 7.5),
        ("sd_v3", "FlowMatchEulerDiscreteScheduler", "bf16", 7.0), ("flux", "FlowMatchEulerDiscreteScheduler", "bf16", 3.5),
        ("chroma", "FlowMatchEulerDiscreteScheduler", "bf16", 5.0),
    ],
)  # fmt: skip
def test_defaults_of_each_family(generate, tmp_path, name, scheduler, dtype, guidance):
    done = generate(name)
    assert done.code == 0, done.err
    settings = record(tmp_path, name)
    assert settings["scheduler"] == (scheduler or settings["scheduler"])
    assert (settings["dtype"], settings["guidance_scale"], settings["seed"]) == (dtype, guidance, 42)
    assert done.err.count("fp32 instead of fp16") == (name == "sdxl")
    assert pixels(tmp_path, name).shape == (3, 16, 16, 3)


@pytest.mark.parametrize(("name", "is_drawn"), [("flux", False), ("flux_schnell", False), ("chroma", False), ("sd_v3", True)])
def test_torch_before_2_5_does_not_draw_flux_and_chroma(monkeypatch, name, is_drawn):
    monkeypatch.setattr(pipelines, "release", lambda library: (2, 4, 1))
    with contextlib.nullcontext() if is_drawn else pytest.raises(UserError, match=f"drawing with a {name} needs torch 2.5"):
        assert dtype_for(FAMILIES[name], torch.device("cpu"), None) == torch.bfloat16


def test_steps_default_to_the_familys(generate, tmp_path):
    for name, steps in {"sd_v1": 50, "sd_v3": 28, "chroma": 35}.items():
        assert generate(name, num_inference_steps=None, prompt="a dog", prompts_csv=None).code == 0
        assert record(tmp_path, name)["num_inference_steps"] == steps


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sd_v1", {"scheduler": "dpm"}), ("sdxl", {"scheduler": "ddim"}), ("sd_v3", {"scheduler": "flow_heun"}), ("sd_v1", {"dtype": "bf16"}),
        ("sd_v1", {"negative_prompt": "a bus"}), ("sdxl", {"negative_prompt": "a bus"}), ("sd_v3", {"negative_prompt": "a bus"}),
        ("sd_v3", {"max_sequence_length": 8}), ("flux", {"max_sequence_length": 8}), ("flux", {"guidance_scale": 9}), ("sd_v2", {"guidance_scale": 1.5}),
        ("chroma", {"negative_prompt": "a bus"}), ("chroma", {"max_sequence_length": 8}), ("chroma", {"guidance_scale": 9}),
    ],
)  # fmt: skip
def test_an_option_changes_the_images(generate, tmp_path, name, options):
    common = {"dtype": "fp32"} if name in ("sd_v3", "flux", "chroma") else {}
    steps = {"num_inference_steps": 4}
    assert generate(name, results_dir="plain", **steps, **common).code == 0
    done = generate(name, results_dir="changed", **steps, **common, **options)
    assert done.code == 0, done.err
    key, value = next(iter(options.items()))
    if key != "scheduler":
        assert record(tmp_path, name, "changed")[key] == value
    assert (pixels(tmp_path, name, "plain") != pixels(tmp_path, name, "changed")).any()


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("flux", {"negative_prompt": "a"}, "takes no --negative_prompt"), ("sd_v1", {"max_sequence_length": 8}, "T5"),
        ("sd_v3", {"attention_slicing": []}, "use --enable_model_cpu_offload"), ("sd_v1", {"blur": []}, "--blur was removed"), ("sd_v3", {"scheduler": "ddim"}, "does not suit"),
        ("sd_v1", {"scheduler": "flow_euler"}, "does not suit"), ("sd_v1", {"use_refiner": []}, "SDXL"), ("sd_v1", {"strength": 0.5}, "go together"),
        ("sd_v1", {"mask_images": "m"}, "--init_images"), ("sdxl", {"refiner_path": "r"}, "need --use_refiner"), ("sd_v1", {"height": 13}, "cannot draw"),
        ("sdxl", {"model_type": "sd_v1"}, "is a sdxl"), ("sd_v1", {"enable_model_cpu_offload": []}, "needs a GPU"), ("flux", {"model_type": "sd_v3"}, "is a flux"),
        ("sd_v1", {"init_images": "nowhere", "strength": 0.5}, "the image folder"), ("sdxl", {"use_refiner": [], "refiner_path": "sd"}, "not an SDXL refiner"),
        ("sdxl", {"use_refiner": [], "high_noise_frac": 1.0}, "above 0, below 1"),
        ("sd_v3", {"max_sequence_length": 600}, "cannot draw"), ("chroma", {"scheduler": "ddim"}, "does not suit"),
        ("chroma", {"width": 12}, "not divisible by"), ("chroma", {"model_type": "flux"}, "is a chroma"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(generate, family, tmp_path, name, options, says):
    shutil.copytree(family("sd_v1"), tmp_path / "sd")
    done = generate(name, **options)
    assert done.failed_in_one_sentence and says in done.err, done.err
    assert not list(tmp_path.rglob("*.png"))


def test_a_family_that_draws_from_text_only_takes_no_images(generate, tmp_path):
    (tmp_path / "init").mkdir()
    for row in range(len(PROMPTS)):
        Image.new("RGB", (16, 16), "red").save(tmp_path / f"init/{row}.png")
    done = generate("chroma", init_images="init", strength=0.5)
    assert done.failed_in_one_sentence and "draws from text only" in done.err, done.err
    assert not (tmp_path / "results").exists()


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_a_model_distilled_without_guidance_has_the_defaults_of_schnell(generate, family, tmp_path):
    shutil.copytree(family("flux"), tmp_path / "schnell")
    change(tmp_path / "schnell/transformer/config.json", guidance_embeds=False)
    done = generate("flux", model_path="schnell", guidance_scale=3)
    assert done.failed_in_one_sentence and "leave --guidance_scale out" in done.err

    done = generate("flux", model_path="schnell", model_type="flux", num_inference_steps=None)
    assert done.code == 0 and done.err.count("is drawn with 4 steps and 256 T5 tokens") == 1, done.err
    settings = record(tmp_path, "schnell")
    assert [settings[name] for name in ("num_inference_steps", "max_sequence_length", "guidance_scale")] == [4, 256, 0]
    drawn, fed = open_pipeline("schnell", torch.float32), load_encoder("schnell", 2, "meta", "pipeline")
    assert text_encoder(drawn, 2, "pipeline").length == fed.length == 256
    assert load_encoder(str(family("flux")), 2, "meta", "pipeline").length == 512


def test_zero_snr_with_epsilon_prediction_is_named_as_the_cause_of_nan(generate, family, tmp_path):
    shutil.copytree(family("sd_v1"), tmp_path / "zero")
    change(tmp_path / "zero/scheduler/scheduler_config.json", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    done = generate("sd_v1", model_path="zero")
    assert done.failed_in_one_sentence and "rescale_betas_zero_snr with prediction_type epsilon" in done.err, done.err
    assert not list(tmp_path.rglob("*.png"))


def test_several_images_of_a_row(generate, tmp_path):
    assert generate("sd_v1", num_images_per_prompt=3, batch_size=2).code == 0
    folder = tmp_path / "results/none/sd_v1/t2i"
    assert sorted(path.name for path in folder.glob("*.png"))[:3] == [
        "t2i_none_0p.png",
        "t2i_none_0p_1.png",
        "t2i_none_0p_2.png",
    ]
    images = [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("t2i_none_0p*.png"))]
    assert all(abs(images[i] - images[j]).max() > 2 for i, j in ((0, 1), (1, 2), (0, 2)))
    assert generate("sd_v1", results_dir="one", batch_size=2).code == 0
    one, three = snapshot(tmp_path / "one"), snapshot(tmp_path / "results")
    assert all(three[name] == data for name, data in one.items() if name.endswith("png"))
    paired = pair_with_prompts(folder, tmp_path / "p.csv")
    assert list(paired.index) == [0, 0, 0, 1, 1, 1, 2, 2, 2] and paired["prompt"].tolist()[3] == PROMPTS[1]
    (folder / "t2i_none_1p_2.png").unlink()
    with pytest.raises(Exception, match="t2i_none_1p_2"):
        pair_with_prompts(folder, tmp_path / "p.csv")


@pytest.fixture
def inputs(tmp_path):
    """Coloured pictures and half-white masks for three rows, of a size that is none of the model's."""
    for folder in ("init", "mask"):
        (tmp_path / folder).mkdir()
    for row, colour in enumerate([(250, 20, 20), (20, 250, 20), (20, 20, 250)]):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"init/{row}.png")
        mask = np.zeros((30, 40), np.uint8)
        mask[:, 20:] = 255
        Image.fromarray(mask).save(tmp_path / f"mask/x_none_{row}p.png")


@pytest.mark.parametrize("name", NAMES)
def test_image_to_image_depends_on_the_images_and_the_strength(generate, inputs, tmp_path, name):
    steps = {"num_inference_steps": 10, "dtype": "fp32", "init_images": "init"}
    assert generate(name, strength=0.2, results_dir="low", **steps).code == 0
    assert generate(name, strength=1.0, results_dir="high", **steps).code == 0
    settings = record(tmp_path, name, "low")
    assert settings["init_images_sha256"] and settings["strength"] == 0.2
    for row in range(3):
        Image.new("RGB", (16, 16)).save(tmp_path / f"init/{row}.png")
    assert generate(name, strength=0.2, results_dir="black", **steps).code == 0
    low, high, black = (pixels(tmp_path, name, folder) for folder in ("low", "high", "black"))
    assert low.shape == (3, 16, 16, 3)
    assert (low != high).any() and (low != black).any()


@pytest.mark.parametrize("name", NAMES)
def test_inpainting(generate, inputs, tmp_path, name):
    done = generate(name, init_images="init", mask_images="mask", strength=0.8, num_inference_steps=5, dtype="fp32")
    assert done.code == 0, done.err
    assert pixels(tmp_path, name).shape == (3, 16, 16, 3)
    (tmp_path / "mask/x_none_1p.png").unlink()
    done = generate(name, init_images="init", mask_images="mask", strength=0.8, output_path="again")
    assert done.failed_in_one_sentence and "no image for row 1" in done.err


def test_other_input_images_are_another_run(generate, inputs, tmp_path):
    assert generate("sd_v1", init_images="init", strength=0.5).code == 0
    Image.new("RGB", (40, 30)).save(tmp_path / "init/0.png")
    done = generate("sd_v1", init_images="init", strength=0.5)
    assert done.failed_in_one_sentence and "init_images_sha256" in done.err


def changed(module, path):
    """A checkpoint in the published form with other weights than `module`'s."""
    torch.save({"model_state_dict": {key: value + 0.05 for key, value in published_names(module.state_dict()).items()}}, path)
    return path


def test_the_refiner_uses_the_protected_encoder(generate, family, tmp_path):
    pipe = open_pipeline(str(family("sdxl")), torch.float32)
    checkpoint = changed(pipe.text_encoder_2, tmp_path / "c.pt")
    original = fingerprint(open_refiner(str(family("sdxl_refiner")), pipe).text_encoder_2)
    protect(pipe, {2: checkpoint})
    refiner = open_refiner(str(family("sdxl_refiner")), pipe)
    assert fingerprint(refiner.text_encoder_2) == fingerprint(encoder_modules(pipe)[2]) != original
    assert refiner.text_encoder is None
    with torch.no_grad():
        own = refiner.encode_prompt("a dog", do_classifier_free_guidance=False)[0]
        base = pipe.encode_prompt("a dog", do_classifier_free_guidance=False)[0]
    assert torch.equal(own, base[..., -own.shape[-1] :])

    options = {"use_refiner": [], "refiner_path": family("sdxl_refiner"), "num_inference_steps": 10}
    assert generate("sdxl", results_dir="base", num_inference_steps=10).code == 0
    done = generate("sdxl", results_dir="refined", high_noise_frac=0.5, **options)
    assert done.code == 0, done.err
    assert (pixels(tmp_path, "sdxl", "base") != pixels(tmp_path, "sdxl", "refined")).any()
    assert record(tmp_path, "sdxl", "refined")["high_noise_frac"] == 0.5
    for share, which in {0.01: "the base model", 0.999: "the refiner"}.items():
        with pytest.raises(UserError, match=f"{share} of 10 steps leaves no step for {which}"):
            check_refiner(pipe, refiner, Sampling(0, 10, 7.5, high_noise_frac=share))


@pytest.mark.parametrize("variant", ["fp16", None])
def test_fp16_files_are_used_where_they_are(family, tmp_path, variant):
    pipe = open_pipeline(str(family("sdxl")), torch.float32)
    with torch.no_grad():
        pipe.unet.conv_in.bias.fill_(3)  # marks the variant's files
    folder = tmp_path / "both"
    shutil.copytree(family("sdxl"), folder)
    if variant:
        pipe.to(dtype=torch.float16).save_pretrained(folder, variant=variant)
    opened = open_pipeline(str(folder), torch.float16)
    assert opened.unet.dtype == opened.text_encoder.dtype == torch.float16
    assert (opened.unet.conv_in.bias == 3).all() == bool(variant)


def test_a_base_model_that_lacks_weights_is_refused(generate, family, tmp_path):
    from safetensors.torch import load_file, save_file

    for part in ("unet", "text_encoder"):
        broken = tmp_path / f"without-{part}"
        shutil.copytree(family("sd_v1"), broken)
        file = next((broken / part).glob("*.safetensors"))
        state = load_file(file)
        del state[sorted(state)[3]]
        save_file(state, file, {"format": "pt"})
        done = generate("sd_v1", model_path=broken)
        assert done.failed_in_one_sentence and "lacks" in done.err, done.err
    assert not (tmp_path / "results").exists()
