"""The codebook: rows, search, and refusal of what is stale, foreign or damaged."""

import json

from des.data.prompts import read_prompts
from des.models.encoders import load_encoder
from des.training import targets
from des.training.codebook import Codebook, write_codebook
from des.training.targets import find_targets
from des.utils.errors import UserError

import pytest
import torch
from conftest import GOLDEN, snapshot


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(str(GOLDEN / "A/model"))


@pytest.fixture(scope="module")
def prompts():
    return read_prompts(GOLDEN / "A/safe.csv")


@pytest.fixture
def codebook(tmp_path, encoder, prompts):
    write_codebook(tmp_path / "cb", encoder, prompts, batch_size=5)
    return Codebook(tmp_path / "cb")


def test_row_i_is_the_embedding_of_prompt_i_at_any_batch_size(codebook, encoder, prompts):
    alone = torch.cat([next(encoder.encode([prompt], 1)) for prompt in prompts])
    assert codebook.prompts == prompts
    torch.testing.assert_close(codebook.rows(torch.arange(len(codebook))), alone, rtol=1e-5, atol=1e-6)


def test_replacing_the_codebook_of_other_prompts_is_warned_of(codebook, encoder, prompts, caplog, monkeypatch):
    monkeypatch.setattr("des.utils.logs.logger.propagate", True)
    write_codebook(codebook.folder, encoder, prompts, batch_size=5)
    assert "is replaced" not in caplog.text
    write_codebook(codebook.folder, encoder, prompts[:2])
    assert f"of {len(prompts)} other prompts, is replaced by one of 2" in caplog.text


@pytest.mark.parametrize("block", [1, 4, 100])
def test_search_finds_the_least_similar_row(codebook, encoder, monkeypatch, block):
    monkeypatch.setattr("des.training.codebook._BLOCK_BYTES", block * 4 * 77 * 32)
    queries = next(encoder.encode(read_prompts(GOLDEN / "A/unsafe.csv"), 20))
    cosines, indices = codebook.farthest(queries)
    similarity = torch.cosine_similarity(
        queries.flatten(1)[:, None], codebook.rows(torch.arange(len(codebook))).flatten(1)[None], dim=-1
    )
    assert indices.tolist() == similarity.argmin(dim=1).tolist()
    torch.testing.assert_close(cosines, similarity.amin(dim=1))


def test_the_last_bit_of_a_similarity_does_not_depend_on_the_free_memory(codebook, encoder, monkeypatch):
    monkeypatch.setattr("des.training.codebook._QUERIES", 4)
    unsafe = read_prompts(GOLDEN / "A/unsafe.csv")
    queries = torch.cat(list(encoder.encode(unsafe, 4)))
    alone = [torch.cat(each) for each in zip(*map(codebook.farthest, queries.split(4)), strict=True)]
    for one, other in zip(codebook.farthest(queries), alone, strict=True):
        assert one.equal(other)


@pytest.mark.parametrize(("free", "sizes"), [(0, [3, 3, 3, 1]), (7 * 4 * 40, [6, 4]), (10**9, [10])])
def test_free_memory_decides_how_many_queries_share_a_pass(monkeypatch, free, sizes):
    monkeypatch.setattr(targets, "query_bytes", lambda device: free)
    batches = torch.arange(400.0).view(10, 1, 40).split(3)
    groups = list(targets._grouped(batches))
    assert [len(group) for group in groups] == sizes and torch.cat(groups).equal(torch.cat(batches))


def test_only_one_process_of_a_machine_hashes_the_rows(codebook, monkeypatch):
    monkeypatch.setattr("des.training.codebook.sha256_file", lambda path: "changed")
    assert len(Codebook(codebook.folder, check_files=False)) == len(codebook)
    with pytest.raises(UserError, match="is not the file"):
        Codebook(codebook.folder)


@pytest.mark.parametrize(("dtype", "bytes_each"), [("fp32", 4), ("fp16", 2), ("bf16", 2)])
def test_rows_on_disk_have_the_dtype_asked_for(tmp_path, encoder, prompts, dtype, bytes_each):
    write_codebook(tmp_path, encoder, prompts, dtype)
    rows = Codebook(tmp_path).rows(torch.arange(len(prompts)))
    assert (tmp_path / "codebook.safetensors").stat().st_size == pytest.approx(rows.numel() * bytes_each, abs=200)
    torch.testing.assert_close(rows.float(), next(encoder.encode(prompts, 20)), rtol=1e-2, atol=1e-2)


def test_targets_are_read_again_and_do_not_depend_on_the_batch_size(tmp_path, codebook, encoder):
    unsafe = read_prompts(GOLDEN / "A/unsafe.csv")
    first = find_targets(tmp_path / "a.pth", codebook, encoder, unsafe, batch_size=3)
    assert find_targets(tmp_path / "b.pth", codebook, encoder, unsafe, batch_size=50).equal(first)
    stamp = (tmp_path / "a.pth").stat().st_mtime_ns
    assert find_targets(tmp_path / "a.pth", codebook, encoder, unsafe, batch_size=3).equal(first)
    assert (tmp_path / "a.pth").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="have changed: prompts"):
        find_targets(tmp_path / "a.pth", codebook, encoder, unsafe[:-1], batch_size=3)
    assert (
        len(find_targets(tmp_path / "a.pth", codebook, encoder, unsafe[:-1], batch_size=3, recompute=True)) == len(unsafe) - 1
    )


def test_targets_can_be_the_nearest_or_random_rows(tmp_path, codebook, encoder):
    unsafe = read_prompts(GOLDEN / "A/unsafe.csv")
    queries = next(encoder.encode(unsafe, len(unsafe))).flatten(1)
    rows = codebook.rows(torch.arange(len(codebook))).flatten(1)
    similarity = torch.nn.functional.cosine_similarity(queries[:, None], rows[None], dim=-1)

    def choose(choice, seed=1, name=None):
        path = tmp_path / (name or f"{choice}{seed}.pth")
        return find_targets(path, codebook, encoder, unsafe, choice=choice, seed=seed)

    torch.testing.assert_close(similarity.gather(1, choose("highest")[:, None])[:, 0], similarity.amax(1))
    assert choose("random").equal(choose("random", name="again.pth"))
    assert not choose("random").equal(choose("random", seed=2))
    assert choose("random").max() < len(codebook)
    with pytest.raises(UserError, match="have changed: choice of targets"):
        choose("lowest", name="highest1.pth")
    with pytest.raises(UserError, match="have changed: choice of targets"):
        choose("random", seed=2, name="random1.pth")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "foreign", "published"])
def test_foreign_targets_are_refused(tmp_path, codebook, encoder, content):
    path = tmp_path / "safe_embeddings.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"foreign": {"weights": torch.ones(2)}, "published": torch.ones(12, 4)}[content], path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="recompute_targets"):
        find_targets(path, codebook, encoder, ["a"], batch_size=3)
    assert path.read_bytes() == before


def test_a_codebook_of_another_encoder_is_refused(codebook):
    other = load_encoder(str(GOLDEN / "B/model"))
    with pytest.raises(UserError, match=r"other inputs \(encoder"):
        codebook.check(other)


def test_a_damaged_codebook_is_refused(tmp_path, codebook):
    folder = codebook.folder
    rows = folder / "codebook.safetensors"
    whole = rows.read_bytes()
    for damaged in (whole[:-4], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        rows.write_bytes(damaged)
        with pytest.raises(UserError, match="save_codebook"):
            Codebook(folder)
    rows.write_bytes(whole)
    facts = json.loads((folder / "codebook.json").read_text())
    facts["prompts"][0] = "something else"
    (folder / "codebook.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"other inputs \(prompts\)"):
        Codebook(folder).check(load_encoder(str(GOLDEN / "A/model")))


@pytest.mark.parametrize(
    "change",
    [
        {"--csv_path": "missing.csv"},
        {"--csv_path": "no_column.csv"},
        {"--csv_path": "empty.csv"},
        {"--model_path": "nowhere"},
        {"--encoder_idx": "2"},
        {"--batch_size": "0"},
        {"--device": "cuda:7"},
    ],
)
def test_bad_input_writes_nothing(call, tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no_column.csv").write_text("text\na\n")
    (tmp_path / "empty.csv").write_text("")
    before = snapshot(tmp_path)
    options = {
        "--model_path": GOLDEN / "A/model",
        "--device": "cpu",
        "--csv_path": GOLDEN / "A/safe.csv",
        "--save_dir": "cb",
    } | change
    done = call("save_codebook.py", *[part for pair in options.items() for part in pair])
    assert done.failed_in_one_sentence, done.err
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "cb").exists()


@pytest.mark.parametrize("shard_bytes", [10**9, 4 * 77 * 32 * 4])
def test_an_earlier_codebook_stays_until_the_new_one_is_complete(
    tmp_path, codebook, encoder, prompts, monkeypatch, shard_bytes
):
    before, encode = snapshot(codebook.folder), type(encoder).encode
    other = [*prompts[:-1], "another prompt"]

    def interrupted(self, texts, batch_size, desc=None):
        for number, batch in enumerate(encode(self, texts, batch_size, desc)):
            if desc and number == 1:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(type(encoder), "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_codebook(codebook.folder, encoder, other, batch_size=3, shard_bytes=shard_bytes)
    after = snapshot(codebook.folder)
    assert {name: after.get(name) for name in before} == before
    assert Codebook(codebook.folder).prompts == prompts
    write_codebook(codebook.folder, encoder, other, batch_size=3, shard_bytes=shard_bytes)
    write_codebook(tmp_path / "fresh", encoder, other, batch_size=3, shard_bytes=shard_bytes)
    assert snapshot(codebook.folder) == snapshot(tmp_path / "fresh")
