"""The encoder that runs is the one its files describe: every layer, its configuration, its mask, and the file that is read."""

import json
import shutil

from des.export.lora import read as read_lora
from des.models.checkpoints import fingerprint, load_checkpoint, read_tensors, save_checkpoint, save_published
from des.models.encoders import identity, load_encoder, not_padding
from des.models.loading import surplus_layers
from des.models.pipelines import open_pipeline
from des.training.codebook import Codebook, write_codebook
from des.training.targets import find_targets
from des.utils.errors import UserError
from des.utils.resume import PartialFile, differing

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from tiny import clip, clip_tokenizer, t5
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, T5Config, T5ForConditionalGeneration

PROMPTS = ["a dog", "", "many words " * 50, "two cups of tea!"]


def configure(model, **values):
    """Change values of an encoder's config.json."""
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def copied(family, tmp_path):
    """A pipeline of a family whose files a test may change."""
    return lambda name: shutil.copytree(family(name), tmp_path / name)


CASES = [
    ("sd_v1", 1, {"num_hidden_layers": 1}),
    ("sd_v1", 1, {"num_hidden_layers": 0}),
    ("sdxl", 2, {"num_hidden_layers": 2}),
    ("sd_v3", 3, {"num_layers": 2}),
    ("flux", 2, {"num_layers": 0}),
]


@pytest.mark.parametrize(("name", "index", "values"), CASES)
def test_a_configuration_with_fewer_layers_than_the_file_is_refused(copied, name, index, values):
    model = copied(name)
    configure(model / ("text_encoder" if index == 1 else f"text_encoder_{index}"), **values)
    for load in (lambda: load_encoder(str(model), index), lambda: open_pipeline(str(model), torch.float32)):
        with pytest.raises(
            UserError, match=r"layers that its config\.json does not describe|_keep_in_fp32_modules"
        ):  # transformers 4
            load()


def test_a_lora_is_not_read_into_a_shortened_encoder(copied, tmp_path):
    model = copied("sd_v1")
    configure(model / "text_encoder", num_hidden_layers=1)
    with pytest.raises(UserError, match="does not describe"):
        read_lora(str(model), tmp_path, {1: "text_encoder"})


def test_surplus_tensors_inside_a_layer_are_refused(copied):
    """As of a quantised file, whose values mean nothing without its scales."""
    file = copied("sd_v1") / "text_encoder/model.safetensors"
    extra = "text_model.encoder.layers.0.mlp.fc1.scale_weight"
    save_file(load_file(file) | {extra: torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(UserError, match="scale_weight"):
        load_encoder(str(file.parents[1]))


def test_other_parts_of_a_larger_model_are_not_surplus(copied, tmp_path):
    model = copied("sd_v1")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
    text = CLIPTextModel.from_pretrained(model / "text_encoder")
    expected = fingerprint(text)  # before its file changes, which transformers 4 maps into memory
    whole = CLIPModel(CLIPConfig(text_config=text.config.to_dict(), vision_config=vision, projection_dim=8))
    whole.text_model.load_state_dict({name.removeprefix("text_model."): tensor for name, tensor in text.state_dict().items()})
    whole.save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole/model.safetensors")
    tensors |= {"text_model.embeddings.position_ids": torch.arange(77)[None], "classifier.weight": torch.ones(2, 8)}
    save_file(tensors, model / "text_encoder/model.safetensors", {"format": "pt"})
    assert fingerprint(load_encoder(str(model)).model) == expected
    assert fingerprint(open_pipeline(str(model), torch.float32).text_encoder) == expected

    flux = copied("flux")
    config = T5Config.from_pretrained(flux / "text_encoder_2")
    config.num_decoder_layers = config.num_layers
    tensors = T5ForConditionalGeneration(config).state_dict()
    own = load_file(flux / "text_encoder_2/model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if name.startswith(("decoder.block", "lm_head"))} | own,
              flux / "text_encoder_2/model.safetensors", {"format": "pt"})  # fmt: skip
    load_encoder(str(flux), 2)


def test_which_names_are_surplus():
    model = clip(1)
    names = [
        "encoder.layers.7.x",
        "text_model.encoder.layers.7.x",
        "vision_model.encoder.layers.7.x",
        "embeddings.position_ids",
    ]
    assert surplus_layers(model, names) == ["encoder.layers.7.x", "text_model.encoder.layers.7.x"]


def test_the_configuration_is_in_the_identity():
    model, tokenizer = clip(1), clip_tokenizer()
    before = identity(model, tokenizer)
    tokenizer(["a"], padding="max_length", max_length=9, truncation=True)
    model.config.architectures, model.config.dtype = ["Another"], "float16"
    assert identity(model, tokenizer) == before
    for name, value in {"hidden_act": "gelu", "num_attention_heads": 2, "use_attention_mask": True}.items():
        changed = clip(1)
        setattr(changed.config, name, value)
        assert identity(changed, tokenizer)["config"] != before["config"]
    tokenizer.add_tokens(["a new word"])
    assert identity(model, tokenizer)["tokenizer"] != before["tokenizer"]
    assert identity(t5(1), tokenizer)["config"] != before["config"]


@pytest.fixture
def codebook(copied, tmp_path):
    """A pipeline, a codebook made with it, and targets."""
    model = copied("sd_v1")
    encoder = load_encoder(str(model))
    write_codebook(tmp_path / "cb", encoder, PROMPTS)
    find_targets(tmp_path / "targets.pth", Codebook(tmp_path / "cb"), encoder, ["a cat"])
    return model, tmp_path / "cb", tmp_path / "targets.pth"


def test_a_codebook_of_another_configuration_is_refused(codebook):
    model, folder, targets = codebook
    Codebook(folder).check(load_encoder(str(model)))
    configure(model / "text_encoder", hidden_act="gelu_new")
    changed = load_encoder(str(model))
    with pytest.raises(UserError, match=r"other inputs \(encoder configuration\)"):
        Codebook(folder).check(changed)
    with pytest.raises(UserError, match="have changed: encoder configuration"):
        find_targets(targets, Codebook(folder), changed, ["a cat"])


def test_a_codebook_without_the_configuration_is_still_read(codebook):
    model, folder, targets = codebook
    facts = json.loads((folder / "codebook.json").read_text())
    del facts["hashes"]["encoder configuration"]
    (folder / "codebook.json").write_text(json.dumps(facts))
    content = torch.load(targets, weights_only=True)
    del content["hashes"]["encoder configuration"]
    torch.save(content, targets)
    encoder = load_encoder(str(model))
    Codebook(folder).check(encoder)
    assert find_targets(targets, Codebook(folder), encoder, ["a cat"]).equal(content["indices"])


def test_an_unfinished_codebook_without_the_configuration_is_continued(tmp_path):
    before = PartialFile(tmp_path / "codebook.safetensors", {"encoder": "a"}, b"header")
    before.append(b"rows", 2)
    assert PartialFile(tmp_path / "codebook.safetensors", {"encoder": "a", "encoder configuration": "b"}).rows == 2
    assert differing({"encoder configuration": "a"}, {"encoder configuration": "b"}) == ["encoder configuration"]
    assert differing({}, {"encoder": "a", "encoder configuration": "b"}) == ["encoder"]


@pytest.mark.parametrize("name", ["sd_v1", "sd_v2", "sdxl"])
def test_the_configurations_attention_mask_is_obeyed_as_diffusers_does(copied, name):
    model = copied(name)
    plain = load_encoder(str(model), embedding="pipeline")
    without = next(plain.encode(PROMPTS, 4))
    configure(model / "text_encoder", use_attention_mask=True)
    pipe, encoder = open_pipeline(str(model), torch.float32), load_encoder(str(model), embedding="pipeline")
    fed = pipe.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
    ours = next(encoder.encode(PROMPTS, 4))
    torch.testing.assert_close(ours, fed[..., : ours.shape[-1]], rtol=1e-4, atol=5e-5)
    assert torch.equal(ours, without) == (name == "sdxl")  # whose pipeline does not read that key
    last = load_encoder(str(model))
    assert not last.reading.attention_mask
    assert encoder.masked_by_config == (name != "sdxl")


def test_rows_without_the_mask_are_refused_for_an_encoder_that_has_it(copied, tmp_path):
    """A codebook of an earlier version, which did not read `use_attention_mask`."""
    model = copied("sd_v1")
    write_codebook(tmp_path / "cb", load_encoder(str(model), embedding="pipeline"), PROMPTS)
    facts = json.loads((tmp_path / "cb/codebook.json").read_text())
    del facts["hashes"]["encoder configuration"]
    (tmp_path / "cb/codebook.json").write_text(json.dumps(facts))
    configure(model / "text_encoder", use_attention_mask=True)
    with pytest.raises(UserError, match=r"other inputs \(embedding"):
        Codebook(tmp_path / "cb").check(load_encoder(str(model), embedding="pipeline"))


def test_clips_mask_is_the_tokenizers():
    tokenizer = clip_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    given = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert torch.equal(not_padding(given.input_ids, tokenizer.pad_token_id, tokenizer.eos_token_id), given.attention_mask)


def shards(folder, state, form):
    """Write two files of a folder's weights, and their list."""
    write = save_file if form == "safetensors" else torch.save
    stem, names = ("model" if form == "safetensors" else "pytorch_model"), sorted(state)
    files = {f"{stem}-0000{i}-of-00002.{form}": names[i - 1 :: 2] for i in (1, 2)}
    for file, part in files.items():
        write({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / f"{stem}.{form}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "forms", [("file", "shards"), ("shards", "bin"), ("file", "bin"), ("bin", "bin shards"), ("bin shards",), ("shards", "bin shards")]
)  # fmt: skip
def test_a_folder_is_read_as_transformers_reads_it(tmp_path, forms):
    """The first of the forms has the new weights, and the others are left over from an earlier export."""
    for i, form in reversed(list(enumerate(forms))):
        model = clip(10 + i)
        state = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in model.state_dict().items()}
        model.config.save_pretrained(tmp_path)
        if "shards" in form:
            shards(tmp_path, state, "bin" if "bin" in form else "safetensors")
        elif form == "file":
            save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        else:
            torch.save(state, tmp_path / "pytorch_model.bin")
    encoder = clip(1)
    load_checkpoint(encoder, tmp_path)
    assert fingerprint(encoder) == fingerprint(clip(10)) == fingerprint(CLIPTextModel.from_pretrained(tmp_path))


def test_a_folder_whose_configuration_names_another_file_is_refused(tmp_path):
    clip(1).save_pretrained(tmp_path)
    configure(tmp_path, transformers_weights="other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("projected", [False, True])
def test_a_checkpoints_folder_has_the_published_names(tmp_path, projected):
    """Also of a base that transformers 5 saved itself, without the prefix `text_model.`."""
    clip(1, projected=projected).save_pretrained(tmp_path / "base")
    model = type(clip(1, projected=projected)).from_pretrained(tmp_path / "base")
    if not projected and Version(transformers.__version__).major > 4:
        assert "encoder.layers.0.mlp.fc1.weight" in load_file(tmp_path / "base/model.safetensors")
    path = save_checkpoint(tmp_path / "checkpoint-1", model, model.state_dict(), {}, "hf")
    names = load_file(path / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"text_model", *["text_projection"] * projected}
    again = type(model).from_pretrained(path)
    assert fingerprint(again) == fingerprint(model)


def checkpoint_folder(model, index, folder):
    """A checkpoint folder as --save_format hf writes it, whose weights differ from the model's."""
    encoder = load_encoder(str(model), index).model
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05)
    save_published(encoder, folder)
    return folder


@pytest.mark.parametrize(
    ("name", "index", "change"),
    [
        ("sd_v1", 1, {"hidden_act": "gelu"}), ("sd_v1", 1, {"num_attention_heads": 1}), ("sd_v1", 1, {"num_hidden_layers": 1}),
        ("sdxl", 2, {"layer_norm_eps": 0.01}), ("flux", 2, {"feed_forward_proj": "relu"}),
        ("chroma", 1, {"relative_attention_max_distance": 16}),
    ],
)  # fmt: skip
def test_a_checkpoint_folder_of_another_computation_is_refused(family, tmp_path, name, index, change):
    folder, encoder = checkpoint_folder(family(name), index, tmp_path / "c"), load_encoder(str(family(name)), index).model
    before = fingerprint(encoder)
    configure(folder, **change)
    if "feed_forward_proj" in change:
        configure(folder, dense_act_fn="relu")
    with pytest.raises(UserError, match=r"was made for another encoder: its config\.json has"):
        load_checkpoint(encoder, folder)
    assert fingerprint(encoder) == before


@pytest.mark.parametrize("change", [{}, {"eos_token_id": 7, "projection_dim": 5, "attention_dropout": 0.1, "dtype": "float16"}])
def test_a_checkpoint_folder_whose_config_changes_no_embedding_loads(family, tmp_path, change):
    folder, encoder = checkpoint_folder(family("sd_v1"), 1, tmp_path / "c"), load_encoder(str(family("sd_v1"))).model
    configure(folder, **change)
    load_checkpoint(encoder, folder)
    assert fingerprint(encoder) != fingerprint(load_encoder(str(family("sd_v1"))).model)
