"""fid.py --job pickscore, blipscore and imagereward on tiny random models, compared with a plain computation for single images."""

import csv
import json
import re
import shutil

import des.evaluation.text_image
from demo.world import KINDS
from des.evaluation.imagereward import UNREAD, ImageReward, rename
from des.utils.resume import Findings

import numpy as np
import pytest
import torch
from conftest import GOLDEN, flags, snapshot
from PIL import Image
from tiny import clip_tokenizer
from torch.nn.functional import conv2d, gelu, layer_norm, linear
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
)

PROMPTS = [f"a {kind} " + "on a red hill " * (i % 4) for i, kind in enumerate(KINDS[:7])]
PROMPTS[5] = "a red house and a tree " * 30  # longer than any of the models reads
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "on", "red", "hill", "house", "and", "tree", *KINDS]
WORDS += [chr(i) for i in range(ord("b"), ord("z") + 1)] + [f"##{chr(i)}" for i in range(ord("a"), ord("z") + 1)]
WORDS += ["[DEC]"]  # the captioner's first token, in BLIP's files too


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Seven images of several sizes in subfolders and formats, and the CSV of their prompts beside the folder."""
    folder = tmp_path_factory.mktemp("preference")
    with (folder / "p.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case_number", "prompt"])
        writer.writerows([100 + i, prompt] for i, prompt in enumerate(PROMPTS))
    draw = np.random.default_rng(2)
    for i in range(len(PROMPTS)):
        path = folder / "images" / f"part{i % 2}" / f"x_des_{i}p.{('png', 'webp', 'jpg')[i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(draw.integers(0, 256, (5, 4, 3), dtype=np.uint8))
        coarse.resize([(64, 64), (50, 90), (97, 40)][i % 3], Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny random models of the real classes with their processors, in subfolders."""
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        text = CLIPTextConfig.from_pretrained(GOLDEN / "A/model/text_encoder", projection_dim=24).to_dict()
        vision = CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
        )
        louder(CLIPModel(CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=24))).save_pretrained(
            folder / "clip"
        )
        blip = BlipForConditionalGeneration(
            BlipConfig(
                vision_config=BlipVisionConfig(
                    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
                ).to_dict(),
                text_config=BlipTextConfig(
                    vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                    max_position_embeddings=64, bos_token_id=len(WORDS) - 1, sep_token_id=3, eos_token_id=3, pad_token_id=0,
                ).to_dict(),
            )
        )  # fmt: skip
        louder(blip)
        with torch.no_grad():
            blip.text_decoder.cls.predictions.bias[3] += 1.5  # so that captions end at different lengths
        blip.save_pretrained(folder / "blip")
        torch.save(published_state(), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    bert = BertTokenizer(vocab=str(folder / "vocab.txt"))
    bert.save_pretrained(folder / "bert")
    size = {"height": 32, "width": 32}
    BlipProcessor(BlipImageProcessor(size=size), bert).save_pretrained(folder / "blip")
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size), clip_tokenizer()).save_pretrained(
        folder / "clip"
    )
    return folder


def louder(model):
    """Wider random weights, so that images and prompts show in the scores."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def published_state(vision=128, text=64, layers=2, patch=8, size=32):
    """A random state dict with all parameter names of ImageReward.pt and small sizes."""
    state = {
        "blip.visual_encoder.cls_token": (1, 1, vision),
        "blip.visual_encoder.pos_embed": (1, (size // patch) ** 2 + 1, vision),
        "blip.visual_encoder.patch_embed.proj.weight": (vision, 3, patch, patch),
        "blip.visual_encoder.patch_embed.proj.bias": (vision,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (len(WORDS) + 2, text),
        "blip.text_encoder.embeddings.position_embeddings.weight": (40, text),
    }

    def add(prefix, out, width=None):
        state[f"{prefix}.weight"] = (out,) if width is None else (out, width)
        state[f"{prefix}.bias"] = (out,)

    add("blip.visual_encoder.norm", vision)
    add("blip.text_encoder.embeddings.LayerNorm", text)
    for i in range(layers):
        block, layer = f"blip.visual_encoder.blocks.{i}", f"blip.text_encoder.encoder.layer.{i}"
        for name, *shape in (("norm1", vision), ("attn.qkv", 3 * vision, vision), ("attn.proj", vision, vision), ("norm2", vision),
                             ("mlp.fc1", 2 * vision, vision), ("mlp.fc2", vision, 2 * vision)):  # fmt: skip
            add(f"{block}.{name}", *shape)
        for attention, source in (("attention", text), ("crossattention", vision)):
            add(f"{layer}.{attention}.self.query", text, text)
            add(f"{layer}.{attention}.self.key", text, source)
            add(f"{layer}.{attention}.self.value", text, source)
            add(f"{layer}.{attention}.output.dense", text, text)
            add(f"{layer}.{attention}.output.LayerNorm", text)
        add(f"{layer}.intermediate.dense", 2 * text, text)
        add(f"{layer}.output.dense", text, 2 * text)
        add(f"{layer}.output.LayerNorm", text)
    for i, (out, width) in zip((0, 2, 4, 6, 7), ((32, text), (16, 32), (8, 16), (4, 8), (1, 4)), strict=True):
        add(f"mlp.layers.{i}", out, width)
    add("blip.vision_proj", 16, vision)
    add("blip.text_proj", 16, text)
    tensors = {name: torch.randn(shape) * (0.25 if len(shape) > 1 else 0.1) for name, shape in state.items()}
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        tensors[f"blip.visual_encoder.{name}"] *= 0.005  # so that the epsilon of the first layer norm shows
    for i in (0, 2, 4, 6, 7):
        tensors[f"mlp.layers.{i}.weight"] *= 3
    return tensors | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}


def reward(state, image, prompt, tokenizer):
    """ImageReward of one image by its published architecture, in float64, straight from the published names and unpadded."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def dense(x, name):
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name, eps):
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q, k, v):
        q, k, v = (x.unflatten(-1, (-1, 64)).transpose(0, 1) for x in (q, k, v))
        return ((q @ k.transpose(1, 2) / 8).softmax(-1) @ v).transpose(0, 1).flatten(1)

    width, height = image.size
    scale = 32 / min(width, height)
    image = image.resize((int(scale * width) if width > height else 32, int(scale * height) if height > width else 32), 3)
    left, top = round((image.width - 32) / 2), round((image.height - 32) / 2)
    pixels = torch.tensor(np.array(image.crop((left, top, left + 32, top + 32)))).double() / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = ((pixels - torch.tensor(mean).double()) / torch.tensor(std).double()).permute(2, 0, 1)

    eye = "blip.visual_encoder"
    x = (
        conv2d(pixels[None], state[f"{eye}.patch_embed.proj.weight"], state[f"{eye}.patch_embed.proj.bias"], stride=8)[0]
        .flatten(1)
        .T
    )
    x = torch.cat([state[f"{eye}.cls_token"][0], x]) + state[f"{eye}.pos_embed"][0]
    for i in range(2):
        block = f"{eye}.blocks.{i}"
        x = x + dense(attend(*dense(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)), f"{block}.attn.proj")
        x = x + dense(gelu(dense(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    seen = norm(x, f"{eye}.norm", 1e-6)

    book = "blip.text_encoder.embeddings"
    ids = torch.tensor(tokenizer(prompt, truncation=True, max_length=35)["input_ids"])
    x = state[f"{book}.word_embeddings.weight"][ids] + state[f"{book}.position_embeddings.weight"][: len(ids)]
    x = norm(x, f"{book}.LayerNorm", 1e-12)
    for i in range(2):
        layer = f"blip.text_encoder.encoder.layer.{i}"
        for attention, source in (("attention", None), ("crossattention", seen)):
            at = f"{layer}.{attention}"
            source = x if source is None else source
            y = attend(*(dense(z, f"{at}.self.{k}") for z, k in ((x, "query"), (source, "key"), (source, "value"))))
            x = norm(dense(y, f"{at}.output.dense") + x, f"{at}.output.LayerNorm", 1e-12)
        y = dense(gelu(dense(x, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
        x = norm(y + x, f"{layer}.output.LayerNorm", 1e-12)
    x = x[0]
    for i in (0, 2, 4, 6, 7):
        x = dense(x, f"mlp.layers.{i}")
    return ((x - 0.16717362830052426) / 1.0333394966054072).item()


def options_of(job, models):
    return {
        "pickscore": {"model": models / "clip", "processor": models / "clip"},
        "blipscore": {"model": models / "blip", "clip_model": models / "clip"},
        "imagereward": {"model": models / "ImageReward.pt", "processor": models / "bert"},
    }[job]


@pytest.fixture
def score(call, images, models, tmp_path):
    """A function that runs a job and returns the rows of its table and its JSON."""

    def run(job, **changes):
        options = {
            "gen_imgs_path": images / "images",
            "prompt_path": images / "p.csv",
            "output_file": tmp_path / f"{job}.txt",
            "device": "cpu",
        }
        done = call("fid.py", *flags(job=job, **(options | options_of(job, models) | changes)))
        assert done.code == 0, done.err
        assert done.out == (tmp_path / f"{job}.txt").read_text()
        rows = list(csv.DictReader((tmp_path / f"{job}.csv").open()))
        return rows, json.loads((tmp_path / f"{job}.json").read_text())

    return run


@torch.inference_mode()
def one_by_one(job, images, models):
    """The score of each image alone."""
    pictures = [Image.open(next((images / "images").rglob(f"x_des_{i}p.*"))).convert("RGB") for i in range(len(PROMPTS))]
    if job == "imagereward":
        state, bert = torch.load(models / "ImageReward.pt", weights_only=True), BertTokenizer.from_pretrained(models / "bert")
        return [reward(state, image, prompt, bert) for image, prompt in zip(pictures, PROMPTS, strict=True)]
    clip, processor = CLIPModel.from_pretrained(models / "clip").eval(), CLIPProcessor.from_pretrained(models / "clip")

    def feature(text):
        ids = processor(text=[text], truncation=True, max_length=77, return_tensors="pt")["input_ids"]
        feature = clip.text_projection(clip.text_model(ids).pooler_output)[0]
        return feature / feature.norm()

    scores = []
    blip, reader = (
        BlipForConditionalGeneration.from_pretrained(models / "blip").eval(),
        BlipProcessor.from_pretrained(models / "blip"),
    )
    for image, prompt in zip(pictures, PROMPTS, strict=True):
        if job == "pickscore":
            pixels = processor(images=image, return_tensors="pt")["pixel_values"]
            seen = clip.visual_projection(clip.vision_model(pixels).pooler_output)[0]
            scores.append((clip.logit_scale.exp() * (seen / seen.norm()) @ feature(prompt)).item())
        else:
            tokens = blip.generate(**reader(images=image, return_tensors="pt"), max_length=50)[0]
            caption = reader.decode(tokens, skip_special_tokens=True)
            scores.append((feature(prompt) @ feature(caption.strip())).item())
    return scores


@pytest.mark.parametrize("job", ["pickscore", "blipscore", "imagereward"])
def test_scores_are_those_of_each_image_by_itself_at_any_batch_size(score, images, models, job):
    expected = one_by_one(job, images, models)
    assert np.ptp(expected) > 0.02
    for batch_size, workers in ((1, 1), (3, 4), (16, 2)):
        rows, result = score(job, batch_size=batch_size, num_workers=workers)
        assert [int(row["row"]) for row in rows] == list(range(len(PROMPTS)))
        assert all(row["image"].endswith(f"x_des_{i}p.{('png', 'webp', 'jpg')[i % 3]}") for i, row in enumerate(rows))
        scores = [float(row[job]) for row in rows]
        assert scores == pytest.approx(expected, abs=1e-4)
        mean, half = np.mean(scores), 1.959964 * np.std(scores, ddof=1) / len(scores) ** 0.5
        assert (result[job], result["low"], result["high"]) == pytest.approx((mean, mean - half, mean + half), abs=1e-6)
        assert result["n"] == len(PROMPTS) and result["made_by"]["arguments"]["job"] == job


def test_captions_end_at_different_lengths(score):
    """Captions of different lengths, so that batches are padded."""
    lengths = {len(row["caption"].split()) for row in score("blipscore", batch_size=16)[0]}
    assert len(lengths) > 1


def test_every_published_tensor_has_one_place():
    published = published_state()
    model = ImageReward(published).state_dict()
    read = {name: tensor for name, tensor in published.items() if not UNREAD.search(name)}
    assert sorted(map(rename, read)) == sorted(model)
    assert all(torch.equal(model[rename(name)], tensor) for name, tensor in read.items())
    unread = {re.sub(r"\.(weight|bias)$", "", name) for name in published.keys() - read.keys()}
    assert unread == {"blip.vision_proj", "blip.text_proj", "blip.text_encoder.embeddings.position_ids"}


@pytest.mark.parametrize("job", ["pickscore", "blipscore", "imagereward"])
def test_the_results_lie_beside_the_folder(call, images, models, job):
    options = {"gen_imgs_path": images / "images", "prompt_path": images / "p.csv", "coco_imgs_path": "unread", "device": "cpu"}
    assert call("fid.py", *flags(job=job, **(options | options_of(job, models)))).code == 0
    for suffix in ("txt", "json", "csv"):
        (images / f"images_{job}.{suffix}").unlink()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt_path": "short.csv"}, "images beyond the list for row 3"),
        ({"expected": 6}, "contains 7 images instead of the expected 6"),
        ({"model": "blip"}, "is not a file of ImageReward weights"),
        ({"model": "more.pt"}, "more.pt could not be loaded"),
        ({"model": "less.pt"}, "less.pt could not be loaded"),
        ({"model": "headless.pt"}, "the head does not have one output"),
        ({"model": "nowhere"}, "ImageReward.pt of nowhere could not be loaded"),
        ({"processor": "nowhere"}, "the processor of nowhere could not be loaded"),
        ({"clip_model": "clip"}, "--job imagereward does not read --clip_model"),
        ({"variant": "paper"}, "--job imagereward does not read --variant"),
    ],
)
def test_refusals_say_why_and_write_nothing(call, images, models, tmp_path, monkeypatch, change, reason):
    monkeypatch.chdir(tmp_path)
    state = published_state()
    torch.save(state | {"extra": torch.ones(1)}, "more.pt")
    torch.save({name: tensor for name, tensor in state.items() if name != "mlp.layers.4.bias"}, "less.pt")
    torch.save({name: tensor for name, tensor in state.items() if not name.startswith("mlp.layers.7")}, "headless.pt")
    (tmp_path / "blip").mkdir()
    (tmp_path / "blip/ImageReward.pt").write_bytes(b"damaged")
    (tmp_path / "short.csv").write_text("prompt\na\nb\nc\n")
    before = snapshot(tmp_path), snapshot(images)
    options = {"gen_imgs_path": images / "images", "prompt_path": images / "p.csv", "device": "cpu"}
    done = call("fid.py", *flags(job="imagereward", **(options | options_of("imagereward", models) | change)))
    assert done.failed_in_one_sentence and reason in done.err, done.err
    assert (snapshot(tmp_path), snapshot(images)) == before


@pytest.mark.parametrize(("job", "file"), [
    ("pickscore", "clip/processor_config.json"), ("pickscore", "clip/tokenizer_config.json"), ("pickscore", "clip/config.json"),
    ("blipscore", "blip/processor_config.json"), ("blipscore", "blip/generation_config.json"), ("blipscore", "clip/tokenizer_config.json"),
    ("imagereward", "bert/tokenizer_config.json"), ("blipscore", None),
])  # fmt: skip
def test_scores_of_an_interrupted_run_are_those_of_the_same_configuration(
    score, call, models, tmp_path, monkeypatch, job, file
):
    changed = shutil.copytree(models, tmp_path / "models")

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="interrupted"):
        patch.setattr("des.evaluation.scored_images.write_json", killed)
        score(job, **options_of(job, changed))
    kept = (tmp_path / f".{job}.part.jsonl").read_text().splitlines()
    assert len(kept) == len(PROMPTS)
    if file is None:
        monkeypatch.setitem(des.evaluation.text_image.CAPTION, "max_length", 4)
    else:
        content = json.loads((changed / file).read_text())
        (changed / file).write_text(json.dumps(content | {"another": "entry"}))
    calls = []
    monkeypatch.setattr(Findings, "finish", lambda self: calls.append(self.path.read_text().splitlines()))
    _, result = score(job, **options_of(job, changed))
    assert len(calls[0]) == 2 * len(PROMPTS), "all images are scored again"
    if job == "blipscore":
        assert result["caption_settings"]["max_length"] == (50 if file else 4)
