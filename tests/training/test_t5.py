"""T5's size: a codebook in bounded memory, optimisers for bf16 weights, and what --dry_run says."""

import json
import os

from des.models.encoders import load_encoder
from des.models.loading import release
from des.training import losses
from des.training.codebook import Codebook, write_codebook
from des.training.loop import Settings, train
from des.training.pairs import Pairs
from des.training.targets import find_targets
from des.utils.processes import Processes

import pytest
import torch
from conftest import GOLDEN, flags, snapshot

MEMORY = """
from pathlib import Path

from des.models.checkpoints import fingerprint
from des.training.codebook import Codebook, write_codebook
from des.training.targets import find_targets
from des.models.encoders import load_encoder

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024

encoder = load_encoder("model", 3, max_sequence_length=128)
next(encoder.encode(["warm up"] * 32, 32))
fingerprint(encoder.model)
prompts = [f"picture {i} of a bus and {i * i} dogs" for i in range(1000)]
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # restarts the peak
write_codebook(Path("cb"), encoder, prompts, batch_size=32, shard_bytes=25_000_000)
written = status("VmHWM") - before
codebook = Codebook(Path("cb"))
rows = find_targets(Path("targets.pth"), codebook, encoder, prompts[:64])
print(written, status("VmHWM") - before, len(codebook), codebook.facts["dtype"], codebook.facts["tokens"], codebook.facts["hidden"], len(rows))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc to measure memory")
def test_a_codebook_is_written_and_searched_in_bounded_memory(fork, tmp_path):
    """1,000 prompts x 128 x 256 in bf16, 66 MB in three shards."""
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    AutoTokenizer.from_pretrained(GOLDEN / "C/model/tokenizer_3").save_pretrained(tmp_path / "model/tokenizer_3")
    sizes = {"d_model": 256, "d_kv": 32, "d_ff": 256, "num_layers": 1, "num_heads": 2, "vocab_size": 138}
    T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes)).save_pretrained(tmp_path / "model/text_encoder_3")
    (tmp_path / "memory.py").write_text(MEMORY)
    done = fork(tmp_path / "memory.py")
    assert done.code == 0, done.err
    written, peak, *facts = done.out.split()
    assert facts == ["1000", "bf16", "128", "256", "64"]
    assert [path.stat().st_size // 10**6 for path in sorted((tmp_path / "cb").glob("*.safetensors"))] == [24, 24, 15]
    assert float(written) < 60 and float(peak) < 150  # the file is mapped into memory while it is searched


@pytest.fixture
def t5(family):
    return family("flux")


def test_shards_hold_the_same_rows_as_one_file(t5, tmp_path):
    encoder = load_encoder(str(t5), 2)
    prompts = [f"{i} {'dogs and ' * (i % 5)} a bus" for i in range(23)]
    write_codebook(tmp_path / "one", encoder, prompts, batch_size=4)
    write_codebook(tmp_path / "many", encoder, prompts, batch_size=4, shard_bytes=64 * 96 * 2 * 5)
    one, many = Codebook(tmp_path / "one"), Codebook(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 5 and len(one) == len(many) == 23
    rows = torch.tensor([22, 0, 4, 5, 9, 10])
    assert torch.equal(one.rows(rows), many.rows(rows))
    queries = next(encoder.encode(["a kite", "3 dogs", "two people"], 3))
    (cosines, indices), (cosines_of_many, indices_of_many) = (codebook.farthest(queries) for codebook in (one, many))
    assert torch.equal(indices, indices_of_many)
    torch.testing.assert_close(cosines, cosines_of_many)
    (tmp_path / "many/codebook-00002-of-00005.safetensors").unlink()
    with pytest.raises(Exception, match="run save_codebook"):
        Codebook(tmp_path / "many")


def test_norms_do_not_overflow_in_fp16(t5, tmp_path):
    encoder = load_encoder(str(t5), 2)
    with torch.no_grad():
        encoder.model.encoder.final_layer_norm.weight.mul_(20)
    write_codebook(tmp_path / "cb", encoder, ["a dog", "a bus"], dtype="fp16")
    codebook = Codebook(tmp_path / "cb")
    rows = codebook.rows(torch.arange(2))
    assert rows.dtype == torch.float16 and (rows.double() ** 2).sum(dim=(1, 2)).min() > 65504
    torch.testing.assert_close(codebook.norms().double(), rows.double().flatten(1).norm(dim=1), rtol=1e-5, atol=0)
    with torch.no_grad():
        encoder.model.encoder.final_layer_norm.weight.mul_(1e5)
    with pytest.raises(Exception, match="overflows fp16"):
        write_codebook(tmp_path / "over", encoder, ["a dog"], dtype="fp16")


def train_steps(t5, tmp_path, optimizer, precision):
    """Ten steps at the paper's rate; the share of weights that have moved."""
    encoder = load_encoder(str(t5), 2)
    prompts = [f"{i} dogs" for i in range(8)]
    write_codebook(tmp_path / "cb", encoder, prompts)
    codebook = Codebook(tmp_path / "cb")
    n, e0 = next(encoder.encode(["nudity", ""], 2)).float().clone()
    targets = find_targets(tmp_path / "t.pth", codebook, encoder, prompts)
    pairs = Pairs(encoder.tokenize(prompts), encoder.tokenize(prompts), targets, torch.arange(8), codebook, codebook)
    before = [parameter.detach().float().clone() for parameter in encoder.model.parameters()]
    settings = Settings(num_epochs=10, batch_size=8, optimizer=optimizer, precision=precision)
    concept = losses.Concept(n, e0, n.norm().item())
    train(
        encoder,
        pairs,
        concept,
        encoder.tokenize(["nudity"]),
        settings,
        Processes(encoder.device),
        lambda _: None,
        lambda *_: None,
    )
    moved = [(now.float() != then).flatten() for now, then in zip(encoder.model.parameters(), before, strict=True)]
    return torch.cat(moved).float().mean().item(), {parameter.dtype for parameter in encoder.model.parameters()}


def test_stochastic_rounding_moves_what_plain_adamw_leaves(t5, tmp_path):
    plain, dtypes = train_steps(t5, tmp_path, "adamw", "bf16_weights")
    assert dtypes == {torch.bfloat16}
    rounded, dtypes = train_steps(t5, tmp_path, "adamw_bf16_sr", "bf16_weights")
    assert dtypes == {torch.bfloat16}
    exact, dtypes = train_steps(t5, tmp_path, "adamw", "fp32")
    assert dtypes == {torch.float32}
    assert plain < 0.5 * rounded < rounded < exact


@pytest.fixture
def train_des(call, tmp_path, monkeypatch, t5):
    """Run train_des.py on the tiny T5, with its codebook there."""
    monkeypatch.chdir(tmp_path)

    def run(**changes):
        if not (tmp_path / "cb_encoder2").exists():
            made = {"model_path": t5, "encoder_idx": 2, "csv_path": GOLDEN / "A/safe.csv", "save_dir": "cb", "device": "cpu"}
            assert call("save_codebook.py", *flags(**made)).code == 0
        options = {
            "model_path": t5,
            "text_encoder_idx": 2,
            "device": "cpu",
            "codebook_dir": "cb",
            "output_dir": "out",
            "num_epochs": 1,
        }
        options |= {"unsafe_csv_path": GOLDEN / "A/unsafe.csv", "safe_csv_path": GOLDEN / "A/safe.csv"} | changes
        return call(
            "train_des.py",
            *[part for key, value in options.items() for part in (f"--{key}", *([] if value == [] else [value]))],
        )

    return run


@pytest.mark.parametrize(
    ("options", "precision", "optimizer"),
    [
        ({}, "bf16_weights", "adamw_bf16_sr"), ({"optimizer": "adamw8bit"}, "bf16_weights", "adamw8bit"),
        ({"precision": "fp32"}, "fp32", "adamw"), ({"gradient_checkpointing": []}, "bf16_weights", "adamw_bf16_sr"), ({"precision": "bf16"}, "bf16", "adamw"),
    ],
)  # fmt: skip
def test_what_t5_is_trained_with(train_des, tmp_path, options, precision, optimizer):
    done = train_des(**options)
    assert done.code == 0, done.err
    metadata = json.loads((tmp_path / "out/encoder2_1e-05_0.3/checkpoint-1-metadata.json").read_text())
    assert (metadata["precision"], metadata["optimizer"]) == (precision, optimizer)
    assert f"trained in {precision} with {optimizer}" in done.err


def test_plain_adamw_on_bf16_weights_is_warned_of(train_des):
    assert "loses small updates" in train_des(optimizer="adamw").err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"optimizer": "adamw_bf16_sr", "precision": "fp32"}, "bf16 weights"),
        ({"multi_gpu": []}, "two CUDA devices"),
        ({"optimizer": "sgd"}, "sgd"),
    ],
)
def test_options_that_would_do_nothing_are_refused(train_des, tmp_path, options, says):
    done = train_des(**options)
    assert done.failed_in_one_sentence and says in done.err
    assert not (tmp_path / "out").exists()


def test_a_device_map_loads_the_same_weights(t5):
    """On one device there is nothing to spread; two GPUs were not at hand."""
    spread, whole = load_encoder(str(t5), 2, device_map="auto"), load_encoder(str(t5), 2)
    assert torch.equal(next(spread.encode(["a dog"], 1)), next(whole.encode(["a dog"], 1)))


def test_dry_run_reads_no_weight_and_writes_nothing(train_des, t5, tmp_path):
    train_des()
    for path in (t5 / "text_encoder_2").glob("*.safetensors"):
        path.rename(path.with_suffix(".away"))
    before = snapshot(tmp_path)
    try:
        done = train_des(dry_run=[], output_dir="elsewhere", codebook_dir="none yet", batch_size=4)
    finally:
        for path in (t5 / "text_encoder_2").glob("*.away"):
            path.rename(path.with_suffix(".safetensors"))
    assert snapshot(tmp_path) == before
    if release("torch") < (2, 10) and not torch.cuda.is_available():
        assert done.failed_in_one_sentence and "torch 2.10 or newer" in done.err
        return
    assert done.code == 0, done.err
    for word in ("weights", "gradients", "optimizer", "activations", "codebook", "3 steps", "24 GB yes", "80 GB yes"):
        assert word in done.out, done.out
    count = sum(parameter.numel() for parameter in load_encoder(str(t5), 2).model.parameters())
    assert f"{count:,} parameters" in done.out
