"""Exports read back, by each format's own reader, as the encoder that was exported; what does not fit leaves nothing."""

import json
import shutil

from des.export.formats import PROMPTS, READERS, WRITERS, comfyui_names, load_protected, outputs, verify
from des.models.encoders import load_encoder
from des.utils.files import sha256_file

import pytest
import torch
from conftest import ROOT, flags, published_form, snapshot
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

SCRIPT = "scripts/export.py"
OPTIONS = {1: "text_encoder_path", 2: "text_encoder_2_path", 3: "text_encoder_3_path"}


def protected(model, index, folder):
    """A protected encoder of a pipeline, and its checkpoint in the published form."""
    encoder = load_encoder(str(model), index)
    generator = torch.Generator().manual_seed(index)
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    state = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    path = folder / f"encoder{index}-2.pt"
    torch.save({"model_state_dict": state}, path)
    facts = {
        "epoch": 2,
        "concept_prompt": ["sexual", "violence"],
        "concept_guidance_scale": 7.5,
        "lambda_safe": 0.3,
        "target": "lowest",
    }
    arguments = {"unsafe_csv_path": "/home/somebody/unsafe.csv", "safe_csv_path": "/home/somebody/safe.csv"}
    facts |= {"base_encoder_sha256": "b" * 64, "made_by": {"arguments": arguments}}
    (folder / f"encoder{index}-2-metadata.json").write_text(json.dumps(facts))
    return encoder, path


def export(call, model, folder, file_format, indices=(1,), **options):
    """Run the script for some encoders; returns how it ended and these encoders by their index."""
    made = {i: protected(model, i, folder) for i in indices}
    paths = {OPTIONS[i]: path for i, (_, path) in made.items()}
    done = call(SCRIPT, *flags(model_path=model, format=file_format, out=folder / "out", **paths, **options))
    return done, {i: encoder for i, (encoder, _) in made.items()}


def assert_same_embeddings(encoder, model, tolerance=1e-6):
    ids = encoder.tokenize([*PROMPTS, "a dog on a skateboard"])
    for ours, theirs in zip(outputs(encoder.model, ids), outputs(model, ids), strict=True):
        torch.testing.assert_close(theirs, ours, atol=tolerance, rtol=tolerance)


def described(metadata, encoder, folder):
    """Whether the metadata of a file of safetensors says what an encoder that `export` made is."""
    checkpoint = folder / f"encoder{encoder.index}-2.pt"
    original = load_encoder(encoder.model_path, encoder.index).base_sha256
    facts = {"method": "des", "concept": ["sexual", "violence"], "base_encoder_sha256": original}
    facts |= {"checkpoint_sha256": sha256_file(checkpoint)}
    facts |= {"doubt": json.loads(metadata["des"])[encoder.subfolder]["doubt"]}
    known = "moved" in (facts["doubt"] or "moved")
    return known and metadata["format"] == "pt" and json.loads(metadata["des"]) == {encoder.subfolder: facts}


def clip_names(layers, projection=False):
    """The names of a CLIP text encoder's tensors in transformers 4.x."""
    stems = ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight"]
    stems += [f"final_layer_norm.{part}" for part in ("weight", "bias")]
    modules = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")] + [
        "layer_norm1",
        "layer_norm2",
        "mlp.fc1",
        "mlp.fc2",
    ]
    stems += [f"encoder.layers.{i}.{m}.{part}" for i in range(layers) for m in modules for part in ("weight", "bias")]
    return {f"text_model.{stem}" for stem in stems} | ({"text_projection.weight"} if projection else set())


def t5_names(layers):
    """The names of a T5 1.1 encoder's tensors."""
    parts = [f"layer.0.SelfAttention.{name}" for name in "qkvo"] + ["layer.0.layer_norm", "layer.1.layer_norm"]
    parts += [f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")]
    names = {f"encoder.block.{i}.{part}.weight" for i in range(layers) for part in parts}
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return names | {"shared.weight", "encoder.final_layer_norm.weight", bias}


PUBLISHED = {
    "clip_l": (
        CLIPTextModel, CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
        clip_names(12), 196, {},
    ),
    "clip_l of SD3": (
        CLIPTextModelWithProjection,
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768),
        clip_names(12, True), 197, {"text_projection.weight": (768, 768)},
    ),
    "clip_g": (
        CLIPTextModelWithProjection,
        CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280, hidden_act="gelu",
        ),
        clip_names(32, True), 517, {"text_model.encoder.layers.30.mlp.fc1.weight": (5120, 1280)},
    ),
    "t5xxl": (
        T5EncoderModel,
        T5Config(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu"),
        t5_names(24), 219, {"encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (10240, 4096)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_comfyui_names_of_the_published_sizes(name):
    model_class, config, expected, count, shapes = PUBLISHED[name]
    with torch.device("meta"):
        named = comfyui_names(model_class(config).state_dict())
    assert named.keys() == expected and len(expected) == count
    for key, shape in shapes.items():
        assert tuple(named[key].shape) == shape


@pytest.mark.parametrize(("name", "indices"), [("sdxl", (1, 2)), ("sd_v3", (3,)), ("flux", (1, 2)), ("chroma", (1,))])
def test_a_pipeline_loads_whole_with_the_protected_encoders(call, family, tmp_path, name, indices):
    model = family(name)
    done, encoders = export(call, model, tmp_path, "pipeline", indices)
    assert done.code == 0, done.err
    dtypes = {"default": torch.float32} | {encoder.subfolder: encoder.model.dtype for encoder in encoders.values()}
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=dtypes)
    for encoder in encoders.values():
        assert_same_embeddings(encoder, getattr(pipe, encoder.subfolder))
    replaced = {f"{encoder.subfolder}/" for encoder in encoders.values()}
    before, after = snapshot(model), snapshot(tmp_path / "out")
    assert after.keys() == before.keys() | {"README.md"}
    assert all(after[file] == content for file, content in before.items() if not file.startswith(tuple(replaced)))


def test_a_pipeline_leaves_no_unprotected_encoder_beside_it(call, tiny_pipeline, tmp_path):
    model = tmp_path / "model"
    DiffusionPipeline.from_pretrained(tiny_pipeline).save_pretrained(model)
    (model / "v1-5-pruned.safetensors").write_bytes(b"a single file, with the original encoder")
    (model / "text_encoder/model.fp16.safetensors").write_bytes(b"the original encoder")
    (model / "README.md").write_text("the original model's card")
    done, _ = export(call, model, tmp_path, "pipeline")
    assert done.code == 0, done.err
    assert not list((tmp_path / "out").rglob("*fp16*")) and not list((tmp_path / "out").glob("*.safetensors"))
    assert "DES" in (tmp_path / "out/README.md").read_text()


def test_a_pipeline_of_the_hub_is_copied_from_its_snapshot(call, tiny_pipeline, tmp_path, hub):
    """A snapshot in the hub's cache is a folder of links."""
    model = tmp_path / "model"
    shutil.copytree(tiny_pipeline, model)
    (model / "old.ckpt").write_bytes(b"the original encoder")
    hub("owner/name", {"main": model})
    made = load_protected("owner/name", {1: protected("owner/name", 1, tmp_path)[1]})
    WRITERS["pipeline"](made, tmp_path / "out")
    verify(made, READERS["pipeline"](made, tmp_path / "out"))
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink() or path.suffix == ".ckpt"]


def test_hf_folders(call, tiny_pipeline, family, tmp_path):
    done, encoders = export(call, tiny_pipeline, tmp_path, "hf", dtype="fp16")
    assert done.code == 0, done.err
    model = CLIPTextModel.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16
    assert_same_embeddings(encoders[1], model.float(), 2e-2)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert described(file.metadata(), encoders[1], tmp_path)
    first, again = (
        load_protected(str(tiny_pipeline), {1: path}).loaded[1] for path in (tmp_path / "encoder1-2.pt", tmp_path / "out")
    )
    assert again["concept_prompt"] == ["sexual", "violence"] and again["doubt"].split("(")[0] == first["doubt"].split("(")[0]
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = {"text_encoder": {"concept": [], "doubt": "it was in doubt"}}
    save_file(tensors, tmp_path / "out/model.safetensors", header | {"des": json.dumps(facts)})
    assert load_protected(str(tiny_pipeline), {1: tmp_path / "out"}).loaded[1]["doubt"] == "it was in doubt"
    (tmp_path / "two").mkdir()
    done, encoders = export(call, family("sdxl"), tmp_path / "two", "hf", (1, 2))
    assert done.code == 0, done.err
    second = CLIPTextModelWithProjection.from_pretrained(tmp_path / "two/out/text_encoder_2")
    assert_same_embeddings(encoders[2], second)


def test_comfyui_files(call, family, tmp_path):
    done, encoders = export(call, family("sd_v3"), tmp_path, "comfyui", (1, 2, 3))
    assert done.code == 0, done.err
    expected = {"clip_l": clip_names(3, True), "clip_g": clip_names(3, True), "t5xxl": t5_names(3)}
    for (name, names), encoder in zip(expected.items(), encoders.values(), strict=True):
        with safe_open(tmp_path / f"out/{name}.safetensors", "pt") as file:
            assert described(file.metadata(), encoder, tmp_path) and set(file.keys()) == names
            own = {name.removeprefix("text_model."): tensor for name, tensor in encoder.model.state_dict().items()}
            assert all(torch.equal(file.get_tensor(key), own[key.removeprefix("text_model.")]) for key in names)


def test_comfyui_file_of_a_family_with_t5_alone(call, family, tmp_path):
    done, encoders = export(call, family("chroma"), tmp_path, "comfyui")
    assert done.code == 0, done.err
    tensors, state = load_file(tmp_path / "out/t5xxl.safetensors"), encoders[1].model.state_dict()
    assert tensors.keys() == state.keys() - {"encoder.embed_tokens.weight"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())


def test_comfyui_in_half_precision(call, family, tmp_path):
    done, encoders = export(call, family("flux"), tmp_path, "comfyui", (1, 2), dtype="bf16")
    assert done.code == 0, done.err
    tensors = load_file(tmp_path / "out/clip_l.safetensors")
    assert tensors.keys() == clip_names(3) and {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    state = encoders[1].model.state_dict()
    key = "encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(tensors[f"text_model.{key}"], state.get(key, state.get(f"text_model.{key}")).bfloat16())


@pytest.mark.parametrize("name", ["sd_v1", "sdxl"])
def test_a_lora_of_full_rank_is_the_linear_part_of_the_change(call, family, tmp_path, name):
    pytest.importorskip("peft")
    model = family(name)
    indices = (1,) if name == "sd_v1" else (1, 2)
    done, encoders = export(call, model, tmp_path, "lora", indices, rank=48)
    assert done.code == 0 and "over 6 prompts" in done.out and "on the concept prompts and" in done.out, done.err
    with safe_open(tmp_path / "out/pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["des"]).keys() == {encoder.subfolder for encoder in encoders.values()}
    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.load_lora_weights(tmp_path / "out")
    for i, encoder in encoders.items():
        original = load_encoder(str(model), i)
        state, full = original.model.state_dict(), encoder.model.state_dict()
        for key in state:
            if key.endswith((*(f"{part}_proj.weight" for part in ("q", "k", "v", "out")), "fc1.weight", "fc2.weight")):
                state[key] = full[key]
        original.model.load_state_dict(state)
        assert_same_embeddings(original, getattr(pipe, encoder.subfolder), 1e-4)
    assert isinstance(pipe, StableDiffusionXLPipeline) == (name == "sdxl")


def lora_checkpoint(model, folder):
    """A checkpoint in which only Linear weights have changed, by a matrix of rank 2 and a small one of full rank."""
    encoder = load_encoder(str(model))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in encoder.model.named_parameters():
            if name.endswith(("fc1.weight", "q_proj.weight", "v_proj.weight")):
                low = torch.randn(weight.shape[0], 2, generator=generator) @ torch.randn(
                    2, weight.shape[1], generator=generator
                )
                weight += 0.1 * low + 0.005 * torch.randn(weight.shape, generator=generator)
    path = folder / "low-2.pt"
    torch.save({"model_state_dict": {key: tensor.clone() for key, tensor in encoder.model.state_dict().items()}}, path)
    return encoder, path


def test_a_loras_stated_error_is_measured_and_falls_with_the_rank(call, tiny_pipeline, tmp_path):
    pytest.importorskip("peft")
    encoder, path = lora_checkpoint(tiny_pipeline, tmp_path)
    prompts = ["a mountain lake", "an old stone bridge", "a bowl of soup"]
    (tmp_path / "prompts.csv").write_text("\n".join(["prompt", *prompts]))
    original, missing = load_encoder(str(tiny_pipeline)), {}
    for rank in (1, 2):
        out = tmp_path / f"rank{rank}"
        options = {"model_path": tiny_pipeline, "text_encoder_path": path, "format": "lora", "out": out, "rank": rank}
        done = call(SCRIPT, *flags(**options, prompts_csv=tmp_path / "prompts.csv"))
        assert done.code == 0, done.err
        pipe = DiffusionPipeline.from_pretrained(tiny_pipeline)
        pipe.load_lora_weights(out)
        ids = encoder.tokenize(prompts)
        lora, full, plain = (outputs(model, ids)[0].flatten(1) for model in (pipe.text_encoder, encoder.model, original.model))
        cosine = torch.cosine_similarity(lora, full).mean().item()
        missing[rank] = ((lora - full).norm(dim=1).sum() / (full - plain).norm(dim=1).sum()).item()
        for text in (done.out, " ".join((out / "README.md").read_text().split())):
            assert f"over 3 prompts: cosine to the protected embedding {cosine:.4f}" in text
            assert f"{100 * missing[rank]:.1f}% of the way to the protected embedding is missing" in text
            assert f"full protection {torch.cosine_similarity(full, plain).mean().item():.4f}" in text
        assert "the LoRA; whether it protects was not measured, because its concept is unknown" in done.out
        assert "not measured, because its concept is unknown" in (out / "README.md").read_text()
        assert not any(prompt in done.out + done.err for prompt in prompts)
    assert missing[2] < 0.3 < missing[1] < 1


def test_a_lora_is_measured_as_the_encoder_is(call, tiny_pipeline, tmp_path):
    """Norms protect the full encoder, and are not in a LoRA."""
    pytest.importorskip("peft")
    encoder, path = load_encoder(str(tiny_pipeline)), tmp_path / "norms-2.pt"
    state = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    torch.manual_seed(0)
    for name in (name for name in state if "layer_norm" in name and name.endswith("weight")):
        state[name] = torch.randn_like(state[name])
    torch.save({"model_state_dict": state}, path)
    (tmp_path / "norms-2-metadata.json").write_text(json.dumps({"concept_prompt": "a mushroom"}))
    given = {"model_path": tiny_pipeline, "text_encoder_path": path, "out": tmp_path / "out"}
    done = call(SCRIPT, *flags(**given, format="lora"))
    assert done.failed_in_one_sentence and "does not protect with --rank 32" in done.err and not (tmp_path / "out").exists()
    assert call(SCRIPT, *flags(**given, format="hf")).code == 0
    with torch.no_grad():
        weight = encoder.model.get_parameter("encoder.layers.0.mlp.fc2.weight")
        weight += 0.05 * torch.randn_like(weight)
    name = next(name for name in state if name.endswith("layers.0.mlp.fc2.weight"))
    state[name] = encoder.model.state_dict()[name]
    torch.save({"model_state_dict": state}, path)
    done = call(SCRIPT, *flags(**given | {"out": tmp_path / "lora"}, format="lora"))
    assert "the LoRA, WHICH MAY NOT PROTECT" in done.out and "hardly moved" in (tmp_path / "lora/README.md").read_text()


REFUSED = {  # family, format, further options, and what the sentence is about
    "a1111 of SDXL": ("sdxl", "a1111", {"base_checkpoint": ROOT / "LICENSE"}, "StableDiffusionXLPipeline"),
    "a1111 of SD 2": ("sd_v2", "a1111", {"base_checkpoint": ROOT / "LICENSE"}, "is for sd_v1, but"),
    "comfyui of SD 2": ("sd_v2", "comfyui", {}, "is sd_v2"),
    "lora of Chroma": ("chroma", "lora", {}, "ChromaPipeline"),
    "lora of FLUX": ("flux", "lora", {}, "FluxPipeline"),
    "a1111 without its base": ("sd_v1", "a1111", {}, "--base_checkpoint"),
    "a rank elsewhere": ("sd_v1", "hf", {"rank": 4}, "--format lora only"),
    "an encoder that is not there": ("sd_v1", "hf", {"text_encoder_2_path": ROOT / "LICENSE"}, "no text encoder 2"),
    "a base model that is no hub id": ("sd_v1", "hf", {"base_model": "stable-diffusion"}, "OWNER/NAME"),
    "an upload of a local copy": ("sd_v1", "hf", {"push_to_hub": "someone/des"}, "pass --base_model"),
    "no scores": ("sd_v1", "hf", {"scores": ROOT / "LICENSE"}, "JSON"),
    "a base that is no single file": ("sd_v1", "a1111", {"base_checkpoint": ROOT / "LICENSE"}, "not a .safetensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_a_weight_is_read(call, family, tmp_path, monkeypatch, case):
    name, file_format, options, message = REFUSED[case]
    monkeypatch.setattr("des.export.formats.load_encoder", None)
    given = {"text_encoder_path": tmp_path / "no.pt"} | options
    done = call(SCRIPT, *flags(model_path=family(name), format=file_format, out=tmp_path / "out", **given))
    assert done.failed_in_one_sentence and message in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_stays(call, tiny_pipeline, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("work")
    done, _ = export(call, tiny_pipeline, tmp_path, "hf")
    assert done.failed_in_one_sentence and "exists already" in done.err
    assert snapshot(tmp_path / "out") == {"precious": b"work"}
    done = call(
        SCRIPT, *flags(model_path=tiny_pipeline, format="hf", out=tiny_pipeline / "out", text_encoder_path=tmp_path / "encoder1-2.pt")
    )  # fmt: skip
    assert done.failed_in_one_sentence and "inside the model" in done.err and not (tiny_pipeline / "out").exists()


def broken(model):
    with torch.no_grad():
        next(model.parameters()).add_(1)
    return model


@pytest.mark.parametrize("file_format", ["pipeline", "hf", "comfyui"])
def test_an_export_that_reads_back_differently_leaves_nothing(call, tiny_pipeline, tmp_path, monkeypatch, file_format):
    import des.export.formats

    read = des.export.formats.READERS[file_format]
    monkeypatch.setitem(des.export.formats.READERS, file_format, lambda *given: {i: broken(m) for i, m in read(*given).items()})
    done, _ = export(call, tiny_pipeline, tmp_path, file_format)
    assert done.failed_in_one_sentence and "other weights than the protected one" in done.err
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_checkpoint_that_changes_nothing_is_refused(call, tiny_pipeline, tmp_path):
    state = CLIPTextModel.from_pretrained(tiny_pipeline / "text_encoder").state_dict()
    torch.save({"model_state_dict": state}, tmp_path / "own.pt")
    done = call(
        SCRIPT, *flags(model_path=tiny_pipeline, format="hf", out=tmp_path / "out", text_encoder_path=tmp_path / "own.pt")
    )
    assert done.failed_in_one_sentence and "does not change the encoder" in done.err and not (tmp_path / "out").exists()


def test_the_card_and_the_upload(call, tiny_pipeline, tmp_path, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, *given, **options):
            calls.append(("create_repo", given, options))

        def upload_folder(self, **options):
            calls.append(("upload_folder", sorted(path.name for path in options["folder_path"].iterdir()), options["repo_id"]))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    options = {"base_model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "push_to_hub": "someone/des-sd15"}
    done, _ = export(call, tiny_pipeline, tmp_path, "hf", **options)
    assert done.code == 0, done.err
    assert [each[0] for each in calls] == ["create_repo", "upload_folder"]
    assert calls[0][1:] == (("someone/des-sd15",), {"private": True, "exist_ok": True})
    assert calls[1][1:] == (["README.md", "config.json", "model.safetensors"], "someone/des-sd15")
    card = (tmp_path / "out/README.md").read_text()
    front = card.split("---\n")[1]
    assert "license: cc-by-nc-4.0\n" in front and "base_model: stable-diffusion-v1-5/stable-diffusion-v1-5\n" in front
    assert "- concept-erasure\n" in front
    for message in (
        "| concept prompt | sexual, violence |", "| lambda | 0.3 |",
        "`unsafe.csv`", 'text_encoder=CLIPTextModel.from_pretrained("someone/des-sd15", dtype=torch.float32)', "can undo the protection", "## Intended use",
        "| alpha (concept guidance scale) | 7.5 |", "b" * 64,
    ):  # fmt: skip
        assert message in card, message
    assert "/home/" not in card and str(tmp_path) not in card


def test_a_refused_upload_keeps_the_export(call, tiny_pipeline, tmp_path, monkeypatch):
    class Hub:
        def create_repo(self, *given, **options):
            raise OSError("401, no token")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    done, _ = export(call, tiny_pipeline, tmp_path, "hf", push_to_hub="someone/des", base_model="owner/name")
    assert done.failed_in_one_sentence and "is written, but the upload to someone/des" in done.err
    assert (tmp_path / "out/README.md").is_file() and "None given." in (tmp_path / "out/README.md").read_text()


def test_without_peft_a_lora_is_refused_in_a_sentence(call, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # export.py imports it when `call` runs it
    done, _ = export(call, tiny_pipeline, tmp_path, "lora")
    assert done.failed_in_one_sentence and "needs peft" in done.err and not (tmp_path / "out").exists()


def test_what_moves_no_prompt_is_not_exported(call, tiny_pipeline, tmp_path):
    """One changed row of an unused vocabulary entry makes other weights, and the original encoder."""
    state = torch.load(published_form(tiny_pipeline, tmp_path / "row.pt"), weights_only=True)
    name = "text_model.embeddings.token_embedding.weight"
    state["model_state_dict"][name][state["model_state_dict"][name].shape[0] // 2] += 1
    torch.save(state, tmp_path / "row.pt")
    options = {"model_path": tiny_pipeline, "text_encoder_path": tmp_path / "row.pt", "format": "hf", "out": tmp_path / "out"}
    done = call("scripts/export.py", *flags(**options))
    assert done.failed_in_one_sentence and "is not exported as protected" in done.err and not (tmp_path / "out").exists()
