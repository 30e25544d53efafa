"""Every pipeline class and each of its text encoders: codebook, training, checkpoint and generation through the real scripts."""

import json

from des.models.checkpoints import load_checkpoint, published_names
from des.models.encoders import load_encoder, not_padding, text_encoders
from des.models.loading import release
from des.models.pipelines import encoder_modules, open_pipeline, protect
from des.training.codebook import Codebook, find_codebook
from des.utils.errors import UserError

import numpy as np
import pytest
import torch
from conftest import GOLDEN, drawn, flags, snapshot
from PIL import Image
from tiny import build

ENCODERS = {"sd_v1": 1, "sd_v2": 1, "sdxl": 2, "sd_v3": 3, "flux": 2, "chroma": 1}
EACH = [(name, i) for name, count in ENCODERS.items() for i in range(1, count + 1)]
FLAGS = {1: "text_encoder_path", 2: "text_encoder_2_path", 3: "text_encoder_3_path"}
PROMPTS = ["a photo of a dog", "", "two people playing tennis"]


@pytest.fixture
def run(call, tmp_path, monkeypatch):
    """Run a script in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    return lambda script, **options: call(script, *flags(device="cpu", **options))


@pytest.fixture
def train(run, family, tmp_path):
    """Write a codebook and train two steps on case A's prompts; returns how training ended."""

    def start(name, index, codebook=None, **options):
        common = {"model_path": family(name)} | {key: options.pop(key) for key in ("embedding",) if key in options}
        made = run(
            "save_codebook.py", csv_path=GOLDEN / "A/safe.csv", save_dir="cb", encoder_idx=index, **common, **(codebook or {})
        )
        assert made.code == 0, made.err
        settings = {"num_epochs": 1, "batch_size": 6, "learning_rate": "1e-2", "concept_guidance_ratio": 0.8} | options
        files = {"unsafe_csv_path": GOLDEN / "A/unsafe.csv", "safe_csv_path": GOLDEN / "A/safe.csv"}
        return run("train_des.py", codebook_dir="cb", output_dir="out", text_encoder_idx=index, **common, **files, **settings)

    return start


def draw(run, model, out="t2i", **options):
    """Generate two small images."""
    size = {"height": 16, "width": 16, "num_inference_steps": 2}
    return drawn(run("generate.py", model_path=model, prompts_csv="p.csv", output_path=out, **size | options))


def pixels(folder):
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))])


@pytest.mark.parametrize(("name", "index"), EACH)
@pytest.mark.parametrize("embedding", ["last_hidden_state", "pipeline"])
def test_from_codebook_to_images(run, train, family, tmp_path, name, index, embedding):
    if (name, embedding) == ("chroma", "pipeline") and release("diffusers") < (0, 36):
        pytest.skip("it is refused; see test_the_pipeline_embedding_is_what_the_denoiser_gets")
    model = family(name)
    done = train(name, index, embedding=embedding)
    assert done.code == 0, done.err
    suffix, prefix = ("", "") if ENCODERS[name] == 1 else (f"_encoder{index}", f"encoder{index}_")
    facts = json.loads((tmp_path / f"cb{suffix}/codebook.json").read_text())
    checkpoint = tmp_path / f"out/{prefix}0.01_0.3/checkpoint-1.pt"
    metadata = json.loads(checkpoint.with_name("checkpoint-1-metadata.json").read_text())
    assert metadata["embedding"] == facts["hashes"]["embedding"] == embedding
    assert metadata["encoder"] == facts["encoder"] == index
    assert metadata["concept_guidance_scale"] == pytest.approx(0.8 * metadata["concept_norm"])
    assert len((checkpoint.parent / "metrics.jsonl").read_text().splitlines()) == 2
    if embedding == "pipeline":  # a checkpoint is opened in the same way after either
        return

    (tmp_path / "p.csv").write_text("prompt\na photo of a dog\nnudity\n")
    folder = tmp_path / f"results/{{}}/{name}/t2i"
    assert draw(run, model).code == 0
    done = draw(run, model, training_method="des", **{FLAGS[index]: checkpoint})
    assert done.code == 0, done.err
    assert (pixels(tmp_path / str(folder).format("none")) != pixels(tmp_path / str(folder).format("des"))).any()
    assert done.err.count("NOT protected") == 2 * (ENCODERS[name] > 1)  # the warning and the last line

    base, protected = (open_pipeline(str(model), torch.float32) for _ in range(2))
    protect(protected, {index: checkpoint})
    ids = torch.tensor([[0, 5, 9, 3] + [1] * 4])
    for i in encoder_modules(base):
        a, b = (encoder_modules(pipe)[i](input_ids=ids)[0] for pipe in (base, protected))
        assert torch.equal(a, b) == (i != index)


@pytest.mark.parametrize(("name", "index"), EACH)
def test_the_pipeline_embedding_is_what_the_denoiser_gets(family, name, index):
    """Compared with diffusers' own `encode_prompt`."""
    pipe = open_pipeline(str(family(name)), torch.float32)
    if name == "chroma" and release("diffusers") < (0, 36):
        with pytest.raises(UserError, match=r"needs diffusers 0\.36"):
            load_encoder(str(family(name)), index, embedding="pipeline")
        return
    encoder = load_encoder(str(family(name)), index, embedding="pipeline")
    encoder.model.float().load_state_dict(encoder_modules(pipe)[index].state_dict())
    ours = next(encoder.encode(PROMPTS, 3))
    extra = {} if name == "flux" else {"do_classifier_free_guidance": False, "negative_prompt": None}
    doubled = {f"prompt_{i}": None for i in range(2, ENCODERS[name] + 1)} if name in ("sdxl", "sd_v3", "flux") else {}
    fed = pipe.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, **doubled, **extra)
    widths = {i: module.config.hidden_size for i, module in encoder_modules(pipe).items()}
    if name in ("sd_v1", "sd_v2", "chroma"):
        expected = fed[0]
    elif name == "sdxl":
        expected = fed[0].split([widths[1], widths[2]], dim=-1)[index - 1]
    elif name == "sd_v3" and index < 3:
        expected = fed[0][:, :77].split([widths[1], widths[2], fed[0].shape[-1] - widths[1] - widths[2]], dim=-1)[index - 1]
    elif name == "sd_v3":
        expected = fed[0][:, 77:]
    else:
        expected = fed[1][:, None] if index == 1 else fed[0]
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=5e-5)
    if name not in ("sd_v1", "sd_v2", "chroma"):
        last = load_encoder(str(family(name)), index)
        last.model.float()
        other = next(last.encode(PROMPTS, 3))
        assert other.shape != ours.shape or not torch.allclose(other, ours, atol=1e-3)


def test_t5s_mask_is_the_tokenizers(family):
    encoder = load_encoder(str(family("sd_v3")), 3)
    texts = [*PROMPTS, "a <pad> in the middle", "many words " * 50]
    both = encoder.tokenizer(texts, padding="max_length", max_length=64, truncation=True, return_tensors="pt")
    assert torch.equal(not_padding(both.input_ids, encoder.tokenizer.pad_token_id), both.attention_mask)


def test_t5_targets_have_no_dropout_and_rows_are_repeatable(family):
    encoder = load_encoder(str(family("flux")), 2)
    assert encoder.model.config.dropout_rate == 0.1
    encoder.model.train()
    with torch.no_grad():
        ids = encoder.tokenize(PROMPTS)
        assert not torch.equal(encoder(ids), encoder(ids))
    assert torch.equal(next(encoder.encode(PROMPTS, 3)), next(encoder.encode(PROMPTS, 3)))


def test_max_sequence_length_is_t5s(run, family, tmp_path):
    options = {"csv_path": GOLDEN / "A/safe.csv", "model_path": family("flux"), "max_sequence_length": 40, "save_dir": "cb"}
    assert run("save_codebook.py", encoder_idx=2, **options).code == 0
    assert Codebook(tmp_path / "cb_encoder2").rows(torch.tensor([3])).shape == (1, 40, 96)
    done = run("save_codebook.py", encoder_idx=1, **options)
    assert done.failed_in_one_sentence and "T5" in done.err
    train = {"unsafe_csv_path": GOLDEN / "A/unsafe.csv", "safe_csv_path": GOLDEN / "A/safe.csv", "output_dir": "out"}
    done = run("train_des.py", model_path=family("flux"), codebook_dir="cb", text_encoder_idx=2, **train)
    assert done.failed_in_one_sentence and "other inputs (sequence length: 40, now 64)" in done.err


def test_all_encoders_at_once_and_no_other_ones_codebook(run, family, tmp_path):
    options = {"csv_path": GOLDEN / "A/safe.csv", "model_path": family("sd_v3")}
    assert run("save_codebook.py", save_dir="cb", save_all_encoders=[], **options).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cb_encoder1", "cb_encoder2", "cb_encoder3"]
    for i in (1, 2, 3):
        find_codebook(tmp_path / "cb", str(family("sd_v3")), i).check(load_encoder(str(family("sd_v3")), i))
    (tmp_path / "cb_encoder1").rename(tmp_path / "cb")
    train = {"unsafe_csv_path": GOLDEN / "A/unsafe.csv", "safe_csv_path": GOLDEN / "A/safe.csv", "output_dir": "out"}
    for folder, says in {"cb": "other inputs (encoder)", "nowhere": "neither nowhere_encoder2 nor nowhere exists"}.items():
        (tmp_path / "cb_encoder2").rename(tmp_path / "aside") if folder == "cb" else None
        done = run("train_des.py", model_path=family("sd_v3"), codebook_dir=folder, text_encoder_idx=2, **train)
        assert done.failed_in_one_sentence and says in done.err, done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_that_is_not_there_is_refused(run, family, tmp_path, name):
    lacking = ENCODERS[name] + 1
    done = run("save_codebook.py", model_path=family(name), csv_path=GOLDEN / "A/safe.csv", save_dir="cb", encoder_idx=lacking)
    assert done.failed_in_one_sentence
    assert f"no text encoder {lacking}; it has " + ", ".join(f"{i} (" for i in (1,)) in done.err
    (tmp_path / "p.csv").write_text("prompt\na\n")
    if lacking in FLAGS:
        (tmp_path / "c.pt").write_bytes(b"")
        done = draw(run, family(name), training_method="des", **{FLAGS[lacking]: "c.pt"})
        assert done.failed_in_one_sentence and f"text encoder {lacking}" in done.err
        assert not (tmp_path / "results").exists()


def test_a_pipeline_without_its_t5_lists_the_encoders_it_has(family, tmp_path):
    index = json.loads((family("sd_v3") / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"text_encoder_3": [None, None]}))
    assert text_encoders(str(tmp_path)) == {1: "text_encoder", 2: "text_encoder_2"}


def published(model, index, path, change=0.05):
    """A text encoder of a pipeline in the published form: 4.x names, no projection, and changed weights."""
    encoder = load_encoder(str(model), index).model.float()
    state = {name: tensor + change for name, tensor in published_names(encoder.state_dict()).items()}
    torch.save({"model_state_dict": state, "epoch": 2}, path)
    return path


@pytest.mark.parametrize(
    ("name", "index"),
    [("sd_v1", 1), ("sdxl", 1), ("sdxl", 2), ("sd_v3", 1), ("sd_v3", 2), ("sd_v3", 3), ("flux", 2), ("chroma", 1)],
)
def test_published_files_load_and_leave_the_projection(family, tmp_path, name, index):
    path = published(family(name), index, tmp_path / "c.pt")
    encoder = load_encoder(str(family(name)), index).model.float()
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    load_checkpoint(encoder, path)
    for key, tensor in encoder.state_dict().items():
        torch.testing.assert_close(tensor, before[key] + (0 if key == "text_projection.weight" else 0.05))


def refused(kind, family, name, index, tmp_path):
    """A file that must not load into encoder `index` of a pipeline."""
    path = published(family(name), index, tmp_path / "c.pt", 0 if kind == "own weights" else 0.05)
    state = torch.load(path, weights_only=True)["model_state_dict"]
    key = sorted(key for key in state if key.endswith(("q_proj.weight", "SelfAttention.q.weight")))[0]
    if kind == "one key less":
        del state[key]
    elif kind == "another shape":
        state[key] = state[key][:-1]
    elif kind == "another kind":
        return published(family("sd_v3"), 1 if (name, index) in (("sd_v3", 3), ("flux", 2)) else 3, path)
    elif kind == "another width":
        return published(family("sd_v3"), 1 if index == 2 else 2, path)
    torch.save({"model_state_dict": state}, path)
    return path


@pytest.mark.parametrize(
    ("name", "index"), [("sd_v1", 1), ("sdxl", 1), ("sdxl", 2), ("sd_v3", 1), ("sd_v3", 2), ("sd_v3", 3), ("flux", 2)]
)
@pytest.mark.parametrize("kind", ["own weights", "one key less", "another shape", "another kind", "another width"])
def test_no_image_from_a_checkpoint_that_does_not_fit(run, family, tmp_path, name, index, kind):
    path = refused(kind, family, name, index, tmp_path)
    (tmp_path / "p.csv").write_text("prompt\na\n")
    done = draw(run, family(name), training_method="des", **{FLAGS[index]: path})
    assert done.failed_in_one_sentence, done.err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("save_format", ["pt", "safetensors", "hf"])
@pytest.mark.parametrize(("name", "index"), [("sd_v1", 1), ("sdxl", 2), ("sd_v3", 3)])
def test_each_format_loads_to_the_same_weights(train, family, tmp_path, name, index, save_format):
    done = train(name, index, save_format=save_format)
    assert done.code == 0, done.err
    path = next(path for path in tmp_path.glob("out/*/checkpoint-1*") if not path.name.endswith("json"))
    encoder = load_encoder(str(family(name)), index)
    before = {key: tensor.clone() for key, tensor in encoder.model.state_dict().items()}
    metadata = load_checkpoint(encoder.model, path)
    assert metadata["encoder"] == index and not all(
        torch.equal(before[key], tensor) for key, tensor in encoder.model.state_dict().items()
    )
    assert torch.equal(
        before.get("text_projection.weight", torch.ones(1)),
        encoder.model.state_dict().get("text_projection.weight", torch.ones(1)),
    )
    if save_format == "hf":
        opened, info = type(encoder.model).from_pretrained(path, output_loading_info=True)
        assert not info["missing_keys"]
        assert all(torch.equal(tensor, opened.state_dict()[key]) for key, tensor in encoder.model.state_dict().items())


def test_single_encoder_pipelines_are_known_by_their_index_not_their_path(family, tmp_path):
    folder = tmp_path / "flux-sd3-xl"
    build("sd_v1", folder)
    assert text_encoders(str(folder)) == {1: "text_encoder"}
    assert snapshot(folder) == snapshot(family("sd_v1"))
