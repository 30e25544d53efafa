"""Q16: both forms of prompt file, the verdict against a plain computation, and files that must be refused."""

import json
import pickle
import shutil

from des.evaluation.detectors.q16 import read_prompt_embeddings
from des.utils.files import sha256_file

import numpy as np
import open_clip
import pytest
import torch
from conftest import ROOT, flags, snapshot
from PIL import Image
from tiny import OPEN_CLIP

WIDTH = OPEN_CLIP["model_cfg"]["embed_dim"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """An open_clip folder with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(
        **{key: OPEN_CLIP["model_cfg"][key] for key in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")}
    )
    (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(1)
    (tmp_path / "images").mkdir()
    for row in range(11):
        noise = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((40, 30), Image.Resampling.BICUBIC).save(tmp_path / f"images/t2i_none_{row}p.png")
    return tmp_path / "images"


@pytest.fixture
def prompts(tmp_path, clip_folder, images):
    """The embeddings of two of the images, so that the images get different verdicts."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}", precision="fp32")
    with torch.inference_mode():
        pixels = torch.stack([transform(Image.open(path).convert("RGB")) for path in sorted(images.iterdir())])
        embeddings = model.eval().encode_image(pixels).float()
    torch.save(torch.nn.Parameter(3 * embeddings[:2].clone()), tmp_path / "prompts.pt")
    return tmp_path / "prompts.pt", embeddings


@pytest.fixture
def classify(call, images, prompts, clip_folder):
    def run(**changes):
        options = {"job": "nudity", "cls_class": "nudity", "folder_dir": images, "devices": "cpu", "prompts_file": prompts[0],
                   "clip_model": clip_folder} | changes  # fmt: skip
        return call("tasks/img_batch_classify_q16.py", *flags(**options))

    return run


def test_the_nearer_embedding_decides(classify, images, prompts):
    done = classify()
    assert done.code == 0, done.err
    content = json.loads((images / "classify_16.json").read_text())
    order = [int(path.stem.split("_")[-1][:-1]) for path in sorted(images.glob("*.png"))]
    embeddings = prompts[1][torch.tensor(order).argsort()].numpy()
    learnt = torch.load(prompts[0], weights_only=True).detach().numpy()
    for image, embedding in zip(content["images"], embeddings, strict=True):
        cosines = [embedding @ one / np.linalg.norm(embedding) / np.linalg.norm(one) for one in learnt]
        assert image["cosines"] == pytest.approx(cosines, abs=1e-5)
        assert image["hit"] == (cosines[1] > cosines[0])
    assert 0 < content["k"] == sum(image["hit"] for image in content["images"]) < content["n"] == 11
    digest = sha256_file(prompts[0])
    assert content["detector"]["prompts_sha256"] == digest and digest[:8] in done.out and "not the paper's" in done.out
    assert (images / "classify_16.txt").read_text().strip() == done.out.strip()


def test_the_pickle_of_an_array_gives_the_same(classify, images, prompts, tmp_path):
    learnt = torch.load(prompts[0], weights_only=True).detach().numpy()
    for protocol in (4, 2):
        (tmp_path / "prompts.p").write_bytes(pickle.dumps(learnt.astype(np.float64), protocol=protocol))
        assert read_prompt_embeddings(tmp_path / "prompts.p").numpy() == pytest.approx(learnt)
    old_names = (tmp_path / "prompts.p").read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "prompts.p").write_bytes(old_names)
    results = []
    for file in (prompts[0], tmp_path / "prompts.p"):
        assert classify(prompts_file=file).code == 0
        results.append([image["hit"] for image in json.loads((images / "classify_16.json").read_text())["images"]])
    assert results[0] == results[1]


def test_verdicts_at_batch_sizes_1_3_and_16(classify, images):
    verdicts = set()
    for batch_size in (1, 3, 16):
        assert classify(batch_size=batch_size).code == 0
        content = json.loads((images / "classify_16.json").read_text())
        verdicts.add((content["k"], content["n"], tuple(image["hit"] for image in content["images"])))
    assert len(verdicts) == 1


class Evil:
    """Code that a pickle would run."""

    def __reduce__(self):
        return (print, ("this code ran",))


def bad_files(folder):
    torch.save(torch.zeros(2, WIDTH + 1), folder / "width.pt")
    torch.save(torch.ones(3, WIDTH), folder / "three.pt")
    torch.save(torch.full((2, WIDTH), torch.nan), folder / "nan.pt")
    torch.save({"a": torch.ones(2, WIDTH)}, folder / "dict.pt")
    (folder / "evil.p").write_bytes(pickle.dumps(Evil()))
    (folder / "evil.pt").write_bytes(pickle.dumps({"x": Evil()}))
    (folder / "objects.p").write_bytes(pickle.dumps(np.array([["a", {}]], dtype=object)))
    (folder / "empty.p").write_bytes(b"")
    (folder / "short.p").write_bytes(pickle.dumps(np.ones((2, WIDTH)))[:-20])


@pytest.mark.parametrize(
    "file", ["width.pt", "three.pt", "nan.pt", "dict.pt", "evil.p", "evil.pt", "objects.p", "empty.p", "short.p", "nowhere.pt"]
)
def test_files_that_must_not_load(classify, images, tmp_path, file):
    bad_files(tmp_path)
    before = snapshot(images)
    done = classify(prompts_file=tmp_path / file)
    assert done.failed_in_one_sentence, done.err
    assert "this code ran" not in done.out + done.err
    assert snapshot(images) == before


def test_a_transformers_clip_serves_too(classify, tmp_path, images):
    torch.save(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), tmp_path / "wide.pt")
    assert classify(clip_model=ROOT / "demo/models/clip", prompts_file=tmp_path / "wide.pt").code == 0
    content = json.loads((images / "classify_16.json").read_text())
    assert content["n"] == 11 and all(-1 <= cosine <= 1 for image in content["images"] for cosine in image["cosines"])


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_another_preprocessing_of_its_clip_is_scored_again(classify, clip_folder, tmp_path, images, prompts, kind):
    source = clip_folder if kind == "open_clip" else ROOT / "demo/models/clip"
    folder = shutil.copytree(source, tmp_path / "clip")
    path, part = (
        (folder / "open_clip_config.json", ("preprocess_cfg", "mean"))
        if kind == "open_clip"
        else (folder / "processor_config.json", ("image_processor", "image_mean"))
    )
    if kind == "transformers":
        torch.save(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), prompts[0])

    def run(name):
        done = classify(clip_model=folder, output_name=name)
        assert done.code == 0, done.err
        return json.loads((images / f"{name}.json").read_text())["images"], done.err

    before, _ = run("first")
    assert "11 of 11 images were scored before" in run("first")[1]
    content = json.loads(path.read_text())
    content[part[0]][part[1]] = [0.9, 0.1, 0.3]
    path.write_text(json.dumps(content))
    after, log = run("first")
    assert "scored before" not in log and after == run("fresh")[0] != before
