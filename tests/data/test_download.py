"""datasets/download.py against a server on loopback, with small harmless lists of every format."""

import json
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from hashlib import sha1, sha256
from io import BytesIO
from pathlib import Path

from des.data.conversion import write_rows
from des.data.prompt_sets import I2P_COLUMNS, SETS
from des.data.prompts import read_rows
from des.utils.errors import UserError

import pandas as pd
import pytest
from conftest import ROOT, serving, snapshot
from loopback import names
from PIL import Image

SCRIPT = "datasets/download.py"
PROMPTS = ["a red kite, high up", 'a "blue" boat', "zwei Bäume am See", "an owl;\tasleep", " a tall tower "]
REVISION = "0123456789abcdef0123456789abcdef01234567"
DATE = r"\d{4}-\d\d-\d\d"


def table(prompts: list[str], column: str = "prompt", **columns: list) -> bytes:
    """A CSV file with a number before the prompts, as most of the sets have it."""
    rows = pd.DataFrame({"id": range(len(prompts)), column: prompts, **columns})
    return rows.to_csv(index=False).encode()


def hashed(content: bytes) -> str:
    return sha256(content).hexdigest()


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "lists"


@pytest.fixture
def offer(loopback, monkeypatch):
    """Put files on the server in place of a set's public source; returns the set's address there.

    `hub` offers it as the data set's only file, with the given published hash (default: the right one, as of a large file).
    """
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", loopback.url)
    template = "/{repo_id}/resolve/{revision}/{filename}"  # which HF_ENDPOINT sets as well
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", loopback.url + template)
    offered = {}
    monkeypatch.setattr("des.data.prompt_sets.SETS", offered)

    def plain(name: str, content: bytes, file: str = "list.csv", **changes) -> str:
        published = {"sha256": hashed(content)} if SETS[name].sha256 else {}
        url = f"{loopback.url}/{name}/{file}"
        offered[name] = replace(SETS[name], **{"url": url, "rows": None, **published, **changes})
        loopback.files[f"/{name}/{file}"] = content
        return url

    def hub(name: str, content: bytes, file: str = "list.csv", digest: str | None = None, others: tuple = (), **changes) -> str:
        repo = SETS[name].hub
        offered[name] = replace(SETS[name], **{"rows": None, **changes})
        digest = digest or hashed(content)
        lfs = {"size": len(content), "sha256": digest, "pointerSize": 1} if len(digest) == 64 else None
        files = [{"rfilename": "README.md"}, *({"rfilename": other} for other in others)]
        files.append({"rfilename": file, "size": len(content), "blobId": digest, "lfs": lfs})
        info = {"id": repo, "sha": REVISION, "cardData": {"license": "cc0-1.0"}, "siblings": files}
        loopback.files[f"/api/datasets/{repo}"] = json.dumps(info).encode()
        path = f"/datasets/{repo}/resolve/{REVISION}/{file}"
        loopback.files[path] = content
        return loopback.url + path

    plain.hub = hub
    return plain


def prompts_of(path: Path) -> list[str]:
    return read_rows(path)["prompt"].tolist()


def record_of(path: Path) -> dict:
    return json.loads(path.with_suffix(".json").read_text())


def test_a_list_is_checked_converted_and_recorded(call, offer, folder):
    content = table(PROMPTS)
    url = offer("coco_prompts", content, rows=5)
    done = call(SCRIPT, "coco_prompts", "--dir", folder)
    assert done.code == 0
    path = folder / "coco_prompts.csv"
    assert f"{path}: 5 rows, 0 of 5 never drawn" in done.out
    assert list(read_rows(path).columns) == ["prompt", "source_row"]
    assert prompts_of(path) == PROMPTS
    record = record_of(path)
    assert re.fullmatch(DATE, record.pop("date"))
    assert record == {
        "name": "coco_prompts",
        "source": url,
        "licence": "CC BY-NC 4.0",
        "source_sha256": hashed(content),
        "checksum_verified": True,
        "rows": 5,
        "left_out": 0,
        "blank": 0,
        "source_rows": 5,
        "use": "generate",
        "sha256": hashed(path.read_bytes()),
        "columns": ["prompt", "source_row"],
    }
    assert names(folder) == ["coco_prompts.csv", "coco_prompts.json"]


def parquet(rows: pd.DataFrame) -> bytes:
    file = BytesIO()
    rows.to_parquet(file)
    return file.getvalue()


ROWS = [{"n": i, "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
FORMATS = {
    "list.csv": table(PROMPTS),
    "bom.csv": b"\xef\xbb\xbf" + pd.DataFrame({"Prompt": PROMPTS}).to_csv(index=False).encode(),
    "list.tsv": pd.DataFrame(ROWS).to_csv(index=False, sep="\t").encode(),
    "list.txt": "".join(f"{prompt}\r\n" for prompt in PROMPTS).encode(),
    "records.json": json.dumps(ROWS).encode(),
    "columns.json": json.dumps({"n": list(range(5)), "prompt": PROMPTS}).encode(),
    "within.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "strings.json": json.dumps(PROMPTS).encode(),
    "list.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
    "list.parquet": b"",  # made in the test, so that a lack of pyarrow fails there
}


@pytest.mark.parametrize("file", FORMATS)
def test_every_format_gives_the_same_rows(call, offer, folder, tmp_path, file):
    content = FORMATS[file] or parquet(pd.DataFrame(ROWS))
    offer("unlearndiffatk", content, file)
    assert call(SCRIPT, "unlearndiffatk", "--dir", folder).code == 0
    assert prompts_of(folder / "unlearndiffatk.csv") == PROMPTS
    assert record_of(folder / "unlearndiffatk.csv")["source_rows"] == 5
    (tmp_path / file).write_bytes(content)
    assert call(SCRIPT, "--convert", tmp_path / file, "unlearndiffatk", "--dir", tmp_path / "own").code == 0
    assert (tmp_path / "own/unlearndiffatk.csv").read_bytes() == (folder / "unlearndiffatk.csv").read_bytes()


def test_blank_prompts_are_left_out_and_counted(call, offer, folder):
    prompts = ["a kite", "  ", "two\nlines\r\n", "", "a\rboat"]
    offer("coco_prompts", json.dumps(prompts).encode(), "list.json", rows=5)
    assert call(SCRIPT, "coco_prompts", "--dir", folder).code == 0
    assert prompts_of(folder / "coco_prompts.csv") == ["a kite", "two\nlines\r\n", "a\rboat"]
    record = record_of(folder / "coco_prompts.csv")
    assert (record["rows"], record["blank"], record["source_rows"]) == (3, 2, 5)


def test_a_cut_connection_continues(call, offer, folder, loopback):
    content = table([f"boat number {i}" for i in range(1000)])
    offer("coco_prompts", content)
    loopback.cut, loopback.after = 2, 5_000
    assert call(SCRIPT, "coco_prompts", "--dir", folder).code == 0
    assert loopback.asked == [None, "bytes=5000-", "bytes=10000-"]
    assert loopback.sent == [5_000, 5_000, len(content) - 10_000]
    assert record_of(folder / "coco_prompts.csv")["rows"] == 1000


def test_a_later_run_continues(call, offer, folder, loopback):
    content = table([f"boat number {i}" for i in range(1000)])
    offer("coco_prompts", content)
    loopback.cut, loopback.after = 4, 1_000
    done = call(SCRIPT, "coco_prompts", "--dir", folder)
    assert done.failed_in_one_sentence
    assert "run this command again to continue" in done.err
    assert names(folder) == [".coco_prompts.etag", ".coco_prompts.part"]
    assert call(SCRIPT, "coco_prompts", "--dir", folder).code == 0
    assert loopback.asked[-1] == "bytes=4000-"
    assert names(folder) == ["coco_prompts.csv", "coco_prompts.json"]


def test_a_wrong_checksum_keeps_nothing_and_touches_nothing(call, offer, folder):
    offer("coco_prompts", table(PROMPTS), sha256="0" * 64)
    offer.hub("i2p", table(PROMPTS), digest="1" * 64, required=())
    offer.hub("mma", table(PROMPTS), digest="2" * 40)
    offer("mma_prompts", table(PROMPTS))
    assert call(SCRIPT, "mma_prompts", "--dir", folder).code == 0
    before = snapshot(folder)
    for name, digest in (("coco_prompts", "0" * 64), ("i2p", "1" * 64), ("mma", "2" * 40)):
        done = call(SCRIPT, name, "--dir", folder)
        assert done.failed_in_one_sentence
        assert f"the file received for {name} does not have the published checksum {digest}" in done.err
        assert snapshot(folder) == before


def test_another_number_of_rows_than_published_is_not_kept(call, offer, folder):
    offer("coco_prompts", table(PROMPTS), rows=6)
    offer("coco_10k", table(PROMPTS, case_number=list(range(5)), evaluation_seed=list(range(5))))
    for name, published in (("coco_prompts", 6), ("coco_10k", 9969)):
        done = call(SCRIPT, name, "--dir", folder)
        assert done.failed_in_one_sentence
        assert f"has 5 rows here, and {published} as published" in done.err
    assert names(folder) == []


def test_git_s_hash_of_a_small_hub_file_is_checked(call, offer, folder):
    content = table(PROMPTS, **{name: [7] * 5 for name in I2P_COLUMNS})
    url = offer.hub("i2p", content, digest=sha1(f"blob {len(content)}\0".encode() + content).hexdigest())
    assert call(SCRIPT, "i2p", "--dir", folder).code == 0
    record = record_of(folder / "i2p.csv")
    assert (record["source"], record["licence"], record["checksum_verified"]) == (url, "cc0-1.0", True)
    assert REVISION in record["source"]


def test_i2p_keeps_its_seeds_and_sizes(call, offer, folder):
    columns = {
        "categories": ["hate, violence", "sexual"],
        "hard": [0, 1],
        "sd_seed": [3367100000, 12],
        "sd_guidance_scale": [7.0, 12.5],
        "sd_image_width": [512, 768],
        "sd_image_height": [512, 384],
    }
    offer.hub("i2p", table(["a kite", "a boat"], **columns))
    assert call(SCRIPT, "i2p", "--dir", folder).code == 0
    rows = read_rows(folder / "i2p.csv")
    assert list(rows.columns) == [
        "prompt",
        "categories",
        "sd_seed",
        "sd_guidance_scale",
        "sd_image_width",
        "sd_image_height",
        "source_row",
    ]
    assert rows.loc[1].tolist() == ["a boat", "sexual", "12", "12.5", "768", "384", "1"]
    assert rows["sd_seed"].tolist() == ["3367100000", "12"]


def test_i2p_without_its_seeds_is_refused(call, offer, folder):
    offer.hub("i2p", table(["a kite"], categories=["hate"]))
    done = call(SCRIPT, "i2p", "--dir", folder)
    assert done.failed_in_one_sentence
    assert "has no column `sd_seed` or `evaluation_seed`; its columns are 'id', 'prompt', 'categories'" in done.err
    assert names(folder) == []


def test_i2p_copies_with_evaluation_seed_are_read(call, offer, folder, tmp_path):
    """As UnlearnDiffAtk and others renamed its seed."""
    offer.hub("i2p", b"")
    (tmp_path / "copy.csv").write_bytes(table(["a kite", "a boat"], case_number=[3, 4], evaluation_seed=[3367100000, 12]))
    assert call(SCRIPT, "--convert", tmp_path / "copy.csv", "i2p", "--dir", folder).code == 0
    rows = read_rows(folder / "i2p.csv")
    assert list(rows.columns) == ["prompt", "case_number", "evaluation_seed", "source_row"]
    assert rows["evaluation_seed"].tolist() == ["3367100000", "12"]


def test_missing_numbers_stay_empty_and_whole(call, offer, folder):
    """A column of whole numbers with a gap is not turned into fractions."""
    import pyarrow.parquet

    file = BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a kite", "a boat"], "case_number": [5, None]}), file)
    offer("unlearndiffatk", file.getvalue(), "list.parquet")
    assert call(SCRIPT, "unlearndiffatk", "--dir", folder).code == 0
    assert read_rows(folder / "unlearndiffatk.csv")["case_number"].tolist() == ["5", ""]


def test_a_gated_set_says_where_to_ask(call, offer, folder, loopback, monkeypatch):
    url = offer.hub("mma", table(PROMPTS, column="adv_prompt"))
    loopback.gated.add(url.removeprefix(loopback.url))
    for token, status in (([], 401), (["--token", "hf_wrong"], 403)):
        done = call(SCRIPT, "mma", "--dir", folder, *token)
        assert done.failed_in_one_sentence
        assert (
            f"mma to accounts with access only: ask for it at {SETS['mma'].page}, then pass that account's --token" in done.err
        )
        assert f"answered {status}" in done.err
        assert "hf_wrong" not in done.out + done.err
        assert names(folder) == []
    monkeypatch.setenv("HF_TOKEN", loopback.token)
    assert call(SCRIPT, "mma", "--dir", folder).code == 0
    assert prompts_of(folder / "mma.csv") == PROMPTS
    assert loopback.tokens[-1] == "Bearer hf_opensesame"


def test_a_gate_before_the_list_of_files_says_the_same(call, offer, folder, loopback):
    offer.hub("p4d", table(PROMPTS))
    loopback.gated.add(f"/api/datasets/{SETS['p4d'].hub}")
    done = call(SCRIPT, "p4d", "--dir", folder)
    assert done.failed_in_one_sentence
    assert f"p4d to accounts with access only: ask for it at {SETS['p4d'].page}" in done.err
    done = call(SCRIPT, "p4d", "--dir", folder, "--token", loopback.token)
    assert done.code == 0
    assert loopback.token not in done.out + done.err


def test_the_token_stays_with_its_host(call, offer, folder, loopback):
    url = offer.hub("mma", table(PROMPTS, column="adv_prompt"))
    path = url.removeprefix(loopback.url)
    loopback.gated |= {path, "/moved"}
    with serving() as other:
        other.files["/stored"] = loopback.files[path]
        loopback.redirects = {path: f"{loopback.url}/moved", "/moved": f"{other.url}/stored"}
        done = call(SCRIPT, "mma", "--dir", folder, "--token", loopback.token)
    assert done.code == 0
    assert loopback.paths[1:] == [path, "/moved"]
    assert loopback.tokens[1:] == [f"Bearer {loopback.token}"] * 2
    assert (other.paths, other.tokens) == (["/stored"], [None])
    assert prompts_of(folder / "mma.csv") == PROMPTS
    written = b"".join(snapshot(folder).values()).decode()
    assert loopback.token not in done.out + done.err + written


def test_the_token_goes_to_the_hub_only(call, offer, folder, loopback):
    offer("coco_prompts", table(PROMPTS))
    assert call(SCRIPT, "coco_prompts", "--dir", folder, "--token", loopback.token).code == 0
    assert loopback.tokens == [None]


def test_a_token_that_no_header_can_hold_is_refused_unquoted(call, offer, folder, loopback):
    offer.hub("mma", table(PROMPTS))
    done = call(SCRIPT, "mma", "--dir", folder, "--token", "hf_secret\nX: y")
    assert done.failed_in_one_sentence
    assert "hf_secret" not in done.err
    assert loopback.paths == []


def test_a_hub_set_of_several_files_is_left_to_the_user(call, offer, folder):
    offer.hub("p4d", table(PROMPTS), others=("b/other.csv", "notes.txt"))
    done = call(SCRIPT, "p4d", "--dir", folder)
    assert done.failed_in_one_sentence
    assert "joycenerd/p4d has 2 .csv files (b/other.csv, …); download one and pass it to --convert" in done.err


def test_the_hub_cannot_be_reached_or_does_not_know_the_set(call, offer, folder, loopback, monkeypatch):
    offer.hub("p4d", table(PROMPTS))
    loopback.files = {"/other": b""}
    done = call(SCRIPT, "p4d", "--dir", folder)
    assert done.failed_in_one_sentence
    assert re.search(r"joycenerd/p4d could not be found: 127\.0\.0\.1:\d+ answered 404", done.err)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    done = call(SCRIPT, "p4d", "--dir", folder)
    assert done.failed_in_one_sentence
    assert "joycenerd/p4d could not be looked up at 127.0.0.1:9" in done.err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = call(SCRIPT, "p4d", "--dir", folder)
    assert done.failed_in_one_sentence
    assert "HF_HUB_OFFLINE" in done.err


NAMED = ["a kite", "a child in a garden", "a boat", "two girls on a swing", "a tower"]


def test_who_is_a_minor_is_never_in_a_sexual_set(call, offer, folder):
    """The words are harmless: that the set as a whole is sexual suffices."""
    offer("i2p_sexual_prompts", table(NAMED), rows=5)
    done = call(SCRIPT, "i2p_sexual_prompts", "--dir", folder)
    path = folder / "i2p_sexual_prompts.csv"
    assert f"{path}: 3 rows, 2 of 5 never drawn, because they name minors in a sexual set, 0 blank" in done.out
    assert prompts_of(path) == ["a kite", "a boat", "a tower"]
    assert read_rows(path)["source_row"].tolist() == ["0", "2", "4"]
    record = record_of(path)
    assert (record["rows"], record["left_out"], record["source_rows"]) == (3, 2, 5)
    assert "garden" not in path.with_suffix(".json").read_text() + done.out + done.err


def test_other_sets_to_generate_from_keep_minors_that_are_not_in_a_sexual_context(call, offer, folder):
    prompts = [*NAMED, "a kid's kite with explicit instructions", *["a kite"] * 60]
    offer("i2p_hate_prompts", table(prompts))
    assert call(SCRIPT, "i2p_hate_prompts", "--dir", folder).code == 0
    assert prompts_of(folder / "i2p_hate_prompts.csv") == [*NAMED, *["a kite"] * 60]
    assert record_of(folder / "i2p_hate_prompts.csv")["left_out"] == 1


def test_training_sets_keep_every_row(call, offer, folder):
    offer("unsafe_prompts_copro_sexual", table(NAMED), rows=5, sexual=True)
    done = call(SCRIPT, "unsafe_prompts_copro_sexual", "--dir", folder)
    path = folder / "unsafe_prompts_copro_sexual.csv"
    assert prompts_of(path) == NAMED
    assert (record_of(path)["left_out"], record_of(path)["use"]) == (0, "train")
    assert "5 rows, a training set, of which none is left out" in done.out


def test_sets_are_sexual_or_for_training_as_the_readme_says():
    training = {name for name, a_set in SETS.items() if a_set.use == "train"}
    assert training == {
        "safe_prompts_copro_sexual",
        "unsafe_prompts_copro_sexual",
        "copro_sexual",
        "copro_violence",
        "copro_illegal",
    }
    drawn = {name for name, a_set in SETS.items() if a_set.use == "generate" and not a_set.images_of}
    harmless = {name for name in drawn if not SETS[name].sexual}
    others = {f"i2p_{kind}_prompts" for kind in ("harassment", "hate", "illegal", "selfharm", "shocking", "violence")}
    assert harmless == {"coco_prompts", "coco_10k", "ringabell_violence_prompts", "vangogh_test"} | others
    assert len(drawn - harmless) == 11


PAIRS = [("a calm lake 0", "storm 0"), ("a calm, child 1", "storm 1"), ("a calm lake 2", "storm 2")]
RECORDS = [
    {"concept": "weather", "category": "Sexual", "safe_prompt": safe, "unsafe_prompt": unsafe} for safe, unsafe in PAIRS
] + [{"concept": "fire", "category": "violence", "safe_prompt": "a lamp", "unsafe_prompt": "a fire"}]
COPRO = {
    "records": RECORDS,
    "blank": [*RECORDS, {"category": "sexual", "safe_prompt": " ", "unsafe_prompt": "storm 3"}],
    "splits": {"train": {"a": RECORDS[:2], "b": RECORDS[3:]}, "test": {"c": RECORDS[2]}},
    "by category": {
        "sexual": {"weather": [{"safe": safe, "unsafe": unsafe} for safe, unsafe in PAIRS]},
        "illegal activity": {"fog": [{"safe": "a street", "unsafe": "a fog"}]},
    },
    "lists": {
        "sexual": {"Safe Prompts": [safe for safe, _ in PAIRS], "Unsafe Prompts": [unsafe for _, unsafe in PAIRS]},
        "violence": {"Safe Prompts": ["a lamp"], "Unsafe Prompts": ["a fire"]},
    },
    "columns": {
        "category": ["sexual", "sexual", "violence", "sexual"],
        "safe": [PAIRS[0][0], PAIRS[1][0], "a lamp", PAIRS[2][0]],
        "unsafe": [PAIRS[0][1], PAIRS[1][1], "a fire", PAIRS[2][1]],
    },
    "pandas": json.loads(pd.DataFrame(RECORDS).to_json()),
    "several": [{**record, "category": [record["category"], "shocking"]} for record in RECORDS],
}


@pytest.mark.parametrize("form", COPRO)
def test_copro_yields_pairs_by_category(call, offer, folder, form):
    offer("copro_sexual", json.dumps(COPRO[form]).encode(), "CoPro_v1.0.json")
    assert call(SCRIPT, "copro_sexual", "--dir", folder).code == 0
    sides = [prompts_of(folder / f"copro_sexual_{side}.csv") for side in ("safe", "unsafe")]
    assert list(zip(*sides, strict=True)) == PAIRS
    assert names(folder) == [f"copro_sexual_{side}.{kind}" for side in ("safe", "unsafe") for kind in ("csv", "json")]
    for side in ("safe", "unsafe"):
        record = record_of(folder / f"copro_sexual_{side}.csv")
        assert (record["rows"], record["left_out"], record["blank"]) == (3, 0, int(form == "blank"))
        assert (record["name"], record["licence"], record["use"]) == (f"copro_sexual_{side}", "BSD-3-Clause", "train")


SPLITS = {"ID_concepts": ["weather"], "ID_train_data": RECORDS[:2], "ID_test_data": RECORDS[2:], "OOD_test_data": RECORDS[:1]}


@pytest.mark.parametrize(
    ("argv", "pairs"), [([], PAIRS[:2]), (["--splits", "ID_test_data", "OOD_test_data"], [PAIRS[2], PAIRS[0]])]
)
def test_copro_s_training_split_is_taken_unless_others_are_asked_for(call, offer, folder, argv, pairs):
    offer("copro_sexual", json.dumps(SPLITS).encode(), "CoPro_v1.0.json")
    done = call(SCRIPT, "copro_sexual", "--dir", folder, *argv)
    assert done.code == 0
    assert f"copro_sexual_safe.csv: {len(pairs)} rows" in done.out
    sides = [prompts_of(folder / f"copro_sexual_{side}.csv") for side in ("safe", "unsafe")]
    assert list(zip(*sides, strict=True)) == pairs
    record = record_of(folder / "copro_sexual_safe.csv")
    assert (record["rows"], record["splits"]) == (len(pairs), argv[1:] or ["ID_train_data"])
    assert call(SCRIPT, "copro_sexual", "--dir", folder).code == 0  # whatever is there, unless splits are named
    done = call(SCRIPT, "copro_sexual", "--dir", folder, "--splits", "OOD_test_data")
    assert done.failed_in_one_sentence
    assert f"was made from {', '.join(record['splits'])}; move both lists and their records away" in done.err


def test_half_of_a_pair_from_all_splits_is_not_joined_with_the_training_split(call, offer, folder):
    offer("copro_sexual", json.dumps(SPLITS).encode(), "CoPro_v1.0.json")
    call(SCRIPT, "copro_sexual", "--dir", folder)
    (folder / "copro_sexual_safe.csv").unlink()
    other = folder / "copro_sexual_unsafe.json"
    other.write_text(json.dumps({key: value for key, value in json.loads(other.read_text()).items() if key != "splits"}))
    before = snapshot(folder)
    done = call(SCRIPT, "copro_sexual", "--dir", folder)
    assert done.failed_in_one_sentence
    assert "copro_sexual_unsafe.csv was made from all splits" in done.err
    assert snapshot(folder) == before


def test_a_set_without_a_published_hash_says_that_its_first_is_recorded(call, offer, folder):
    offer("unlearndiffatk", table(PROMPTS))
    done = call(SCRIPT, "unlearndiffatk", "--dir", folder)
    assert (
        f"no hash of unlearndiffatk is published; the sha256 of this download, {hashed(table(PROMPTS))}, is recorded"
        in done.err
    )


def test_addresses_of_files_that_others_published():
    assert SETS["copro_sexual"].url.endswith("rt219/LatentGuard/main/dataset/CoPro_v1.0.json")
    assert SETS["vangogh_test"].url.endswith("OPTML-Group/Diffusion-MU-Attack/main/prompts/vangogh.csv")
    assert SETS["vangogh_test"].rows == 50


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again_after_the_pause_that_it_names(call, offer, folder, loopback, monkeypatch, status):
    pauses = []
    monkeypatch.setattr("des.data.downloads.time.sleep", pauses.append)
    offer("coco_prompts", table(PROMPTS))
    loopback.busy = [(status, "7"), (status, "soon"), (status, "9999")]
    assert call(SCRIPT, "coco_prompts", "--dir", folder).code == 0
    assert pauses == [7, 0, 60]
    loopback.busy = [(status, "0")] * 4
    offer("mma_prompts", table(PROMPTS))
    done = call(SCRIPT, "mma_prompts", "--dir", folder)
    assert done.failed_in_one_sentence
    assert f"answered {status} " in done.err and "; run this command again to continue" in done.err
    assert not loopback.busy


def test_a_busy_hub_is_asked_again(call, offer, folder, loopback):
    offer.hub("p4d", table(PROMPTS))
    loopback.busy = [(503, "0")] * 2
    assert call(SCRIPT, "p4d", "--dir", folder).code == 0
    assert prompts_of(folder / "p4d.csv") == PROMPTS


def test_a_line_end_in_the_token_s_variable_is_left_out(call, offer, folder, loopback, monkeypatch):
    url = offer.hub("mma", table(PROMPTS, column="adv_prompt"))
    loopback.gated.add(url.removeprefix(loopback.url))
    monkeypatch.setenv("HF_TOKEN", f"{loopback.token}\r\n")
    assert call(SCRIPT, "mma", "--dir", folder).code == 0
    assert loopback.tokens[-1] == f"Bearer {loopback.token}"


def test_a_socks_proxy_without_its_package_does_not_stop_the_others(call, offer, folder, monkeypatch):
    def no_package(*_, **__):
        raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.")

    monkeypatch.setattr("des.data.downloads.HfApi.dataset_info", no_package)
    offer.hub("p4d", table(PROMPTS))
    offer("coco_prompts", table(PROMPTS))
    done = call(SCRIPT, "p4d", "coco_prompts", "--dir", folder)
    assert done.failed_in_one_sentence
    assert "1 of 2 sets could not be downloaded: p4d" in done.err
    assert "SOCKS proxy" in done.err
    assert prompts_of(folder / "coco_prompts.csv") == PROMPTS


@pytest.mark.parametrize(("name", "pair"), [("copro_violence", ("a lamp", "a fire")), ("copro_illegal", ("a street", "a fog"))])
def test_copro_s_other_categories(call, offer, folder, name, pair):
    offer(name, json.dumps([COPRO["records"], COPRO["by category"]]).encode(), "CoPro_v1.0.json")
    assert call(SCRIPT, name, "--dir", folder).code == 0
    assert tuple(prompts_of(folder / f"{name}_{side}.csv")[0] for side in ("safe", "unsafe")) == pair


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([{"text": "a lake", "category": "sexual"}], "has no pairs of safe and unsafe prompts of the category sexual"),
        ([{"safe": "a lake", "unsafe": "a storm"}], "has no pairs of safe and unsafe prompts of the category sexual"),
        (
            {"sexual": {"safe": ["a lake"], "unsafe": ["a storm", "hail"]}},
            "different numbers of safe prompts, unsafe prompts and categories",
        ),
        (
            {"category": ["sexual"], "safe": ["a", "b"], "unsafe": ["c", "d"]},
            "different numbers of safe prompts, unsafe prompts and categories",
        ),
        ({"sexual": {"safe": [1], "unsafe": ["a storm"]}}, "values that are not text"),
    ],
)
def test_copro_in_another_form_is_refused(call, offer, folder, content, reason):
    offer("copro_sexual", json.dumps(content).encode(), "CoPro_v1.0.json")
    done = call(SCRIPT, "copro_sexual", "--dir", folder)
    assert done.failed_in_one_sentence
    assert reason in done.err
    assert names(folder) == []


def test_half_of_a_pair_is_made_again(call, offer, folder):
    offer("copro_sexual", json.dumps(RECORDS).encode(), "CoPro_v1.0.json")
    call(SCRIPT, "copro_sexual", "--dir", folder)
    other = folder / "copro_sexual_unsafe.json"
    other.write_text(other.read_text().replace("name", "note"))  # what is not made again keeps its record
    before = snapshot(folder)
    (folder / "copro_sexual_safe.csv").unlink()
    assert call(SCRIPT, "copro_sexual", "--dir", folder).code == 0
    assert snapshot(folder) == before


def test_a_second_run_does_nothing(call, offer, folder, loopback):
    offer("coco_prompts", table(PROMPTS))
    call(SCRIPT, "coco_prompts", "--dir", folder)
    before = snapshot(folder)
    done = call(SCRIPT, "coco_prompts", "--dir", folder)
    assert done.code == 0
    assert "coco_prompts.csv exists already" in done.err
    assert len(loopback.paths) == 1
    assert snapshot(folder) == before


@pytest.mark.parametrize("how", ["edited", "no record", "damaged record"])
def test_a_file_that_its_record_does_not_tell_is_refused_by_name(call, offer, folder, loopback, how):
    offer("coco_prompts", table(PROMPTS))
    call(SCRIPT, "coco_prompts", "--dir", folder)
    path = folder / "coco_prompts.csv"
    if how == "edited":
        path.write_text("prompt\nmine\n")
    elif how == "no record":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text("[]")
    before = snapshot(folder)
    done = call(SCRIPT, "coco_prompts", "--dir", folder)
    assert done.failed_in_one_sentence
    reasons = {"edited": "is not what coco_prompts.json records", "no record": "exists without its record coco_prompts.json"}
    assert reasons.get(how, "is not a readable record") in done.err
    assert str(path.with_suffix("")) in done.err
    assert snapshot(folder) == before
    assert len(loopback.paths) == 1


def test_a_source_that_changed_since_is_refused(call, offer, folder):
    offer("unlearndiffatk", table(PROMPTS))
    call(SCRIPT, "unlearndiffatk", "--dir", folder)
    before = snapshot(folder)
    (folder / "unlearndiffatk.csv").unlink()
    offer("unlearndiffatk", table(PROMPTS[:3]))
    done = call(SCRIPT, "unlearndiffatk", "--dir", folder)
    assert done.failed_in_one_sentence
    assert "unlearndiffatk was made from another file" in done.err
    assert snapshot(folder) == {"unlearndiffatk.json": before["unlearndiffatk.json"]}
    offer("unlearndiffatk", table(PROMPTS))
    assert call(SCRIPT, "unlearndiffatk", "--dir", folder).code == 0
    assert snapshot(folder) == before


def test_all_continues_after_a_set_that_cannot_be_downloaded(call, offer, folder, loopback):
    offer("coco_prompts", table(PROMPTS), sha256="0" * 64)
    url = offer.hub("mma", table(PROMPTS, column="adv_prompt"))
    loopback.gated.add(url.removeprefix(loopback.url))
    offer("sneaky", b"", url=None)
    offer("p4d_prompts", table(PROMPTS))
    offer("unlearndiffatk", table(PROMPTS), "gone.csv")
    del loopback.files["/unlearndiffatk/gone.csv"]
    offer("i2p_hate_prompts", table(PROMPTS))
    done = call(SCRIPT, "--all", "--dir", folder)
    assert done.failed_in_one_sentence
    assert "error: 3 of 5 sets could not be downloaded: coco_prompts, mma, unlearndiffatk" in done.err
    assert "mma to accounts with access only" in done.err
    assert "published checksum" in done.err
    assert "answered 404" in done.err
    kept = [f"{name}.{kind}" for name in ("i2p_hate_prompts", "p4d_prompts") for kind in ("csv", "json")]
    assert names(folder) == kept


def test_a_file_of_the_user(call, offer, folder, tmp_path, loopback):
    """SneakyPrompt's list comes by mail; it is no training set, so minors are left out."""
    offer("sneaky", b"", url=None)
    done = call(SCRIPT, "sneaky", "--dir", folder)
    assert done.failed_in_one_sentence
    assert f"sneaky has no public source: ask its authors at {SETS['sneaky'].page}, then --convert FILE sneaky" in done.err
    (tmp_path / "by_mail.txt").write_text("\n".join(NAMED))
    assert call(SCRIPT, "--convert", tmp_path / "by_mail.txt", "sneaky", "--dir", folder).code == 0
    assert prompts_of(folder / "sneaky.csv") == ["a kite", "a boat", "a tower"]
    record = record_of(folder / "sneaky.csv")
    assert (record["source"], record["left_out"], record["source_rows"]) == ("by_mail.txt", 2, 5)
    assert str(tmp_path) not in (folder / "sneaky.json").read_text()
    assert loopback.paths == []
    assert (tmp_path / "by_mail.txt").read_text() == "\n".join(NAMED)


def test_another_file_than_the_published_one_is_converted_with_a_word(call, offer, folder, tmp_path):
    offer("coco_prompts", table(PROMPTS), rows=5)
    for file, content, verified in (("same.csv", table(PROMPTS), True), ("mine.csv", table(PROMPTS[:2]), False)):
        (tmp_path / file).write_bytes(content)
        done = call(SCRIPT, "--convert", tmp_path / file, "coco_prompts", "--dir", folder / file)
        assert done.code == 0
        assert ("is not the published file" in done.err) != verified
        assert ("has 2 rows here, and 5 as published" in done.err) != verified
        assert record_of(folder / file / "coco_prompts.csv")["checksum_verified"] is verified


def test_a_file_is_not_taken_for_the_one_that_a_list_was_made_from(call, offer, folder, tmp_path):
    offer("sneaky", b"", url=None)
    for file in ("one.txt", "two.txt"):
        (tmp_path / file).write_text(f"a kite of {file}")
    convert = (SCRIPT, "sneaky", "--dir", folder, "--convert")
    assert call(*convert, tmp_path / "one.txt").code == 0
    before = snapshot(folder)
    assert call(*convert, tmp_path / "one.txt").code == 0
    done = call(*convert, tmp_path / "two.txt")
    assert done.failed_in_one_sentence
    assert f"sneaky was made from another file, as {folder / 'sneaky.json'} says" in done.err
    assert snapshot(folder) == before


def test_parquet_without_pyarrow_says_what_to_install(call, offer, folder, tmp_path, monkeypatch):
    offer("sneaky", b"", url=None)
    (tmp_path / "list.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = call(SCRIPT, "--convert", tmp_path / "list.parquet", "sneaky", "--dir", folder)
    assert done.failed_in_one_sentence
    assert "parquet files need pyarrow" in done.err


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("list.xlsx", b"PK", "cannot be converted; the supported formats are"),
        ("list.csv", b"caption\na kite\n", "list.csv has no column `prompt`"),
        ("list.csv", b"", "is not a readable CSV file"),
        ("list.json", b"{", "is not readable JSON"),
        ("list.json", b'["half a character \\ud800"]', "contains unpaired surrogates"),
        ("list.json", b'{"a": 1}', "does not contain a list of records, columns or prompts"),
        ("list.jsonl", b'{"prompt": "a kite"}\n[1', "is not readable JSON"),
        ("list.parquet", b"PAR1", "is not a readable parquet file"),
        ("list.txt", b"\xff\xfe", "is not UTF-8 text"),
        ("list.txt", b"\n \n", "has no usable prompt"),
        ("missing.csv", None, "missing.csv does not exist"),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(call, offer, folder, tmp_path, file, content, reason):
    offer("coco_prompts", table(PROMPTS))
    if content is not None:
        (tmp_path / file).write_bytes(content)
    done = call(SCRIPT, "--convert", tmp_path / file, "coco_prompts", "--dir", folder)
    assert done.failed_in_one_sentence
    assert reason in done.err
    assert names(folder) == []


def test_what_does_not_come_back_from_the_csv_is_not_written(tmp_path, monkeypatch):
    rows = pd.DataFrame({"prompt": ["a kite", "a boat"]}, dtype=str)
    write_rows(rows, tmp_path / "list.csv")
    assert prompts_of(tmp_path / "list.csv") == ["a kite", "a boat"]
    monkeypatch.setattr("des.data.conversion.read_rows", lambda path: rows[:1])
    with pytest.raises(UserError, match="characters that a CSV file cannot represent"):
        write_rows(rows, tmp_path / "list.csv")


def photographs(numbers: list[int]) -> tuple[bytes, dict[str, bytes]]:
    """An archive as COCO's, and its images by name."""
    images = {}
    for number in numbers:
        file = BytesIO()
        Image.new("RGB", (8, 8), (number % 256, 0, 0)).save(file, "jpeg")
        images[f"COCO_val2014_{number:012d}.jpg"] = file.getvalue()
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("val2014/", "")
        for name, image in images.items():
            content.writestr(f"val2014/{name}", image)
    return archive.getvalue(), images


@pytest.fixture
def captions(offer):
    """The list whose images are wanted: two of one photograph, and a third that its `first` rows do not reach."""
    prompts = ["a kite", "a kite again", "a boat", "a tower"]
    offer("coco_10k", table(prompts, case_number=[391895, 391895, 7, 8], evaluation_seed=[1, 2, 3, 4]), first=3)
    return "coco_10k"


def test_coco_s_images_are_those_of_the_list(call, offer, folder, captions, loopback):
    archive, images = photographs([391895, 7, 8])
    url = offer("coco_images", archive, "val2014.zip")
    loopback.cut, loopback.after = 1, 60
    done = call(SCRIPT, "coco_images", "--dir", folder)
    assert done.code == 0
    assert f"{folder / 'coco_images'}: 2 images" in done.out
    assert names(folder) == ["coco_10k.csv", "coco_10k.json", "coco_images", "coco_images.json"]
    wanted = {name: image for name, image in images.items() if not name.endswith("008.jpg")}
    assert snapshot(folder / "coco_images") == wanted
    assert len(wanted) == 2
    record = record_of(folder / "coco_images")
    assert (record["rows"], record["source"], record["source_sha256"]) == (2, url, hashed(archive))
    assert (record["list"], record["list_sha256"]) == ("coco_10k.csv", record_of(folder / "coco_10k.csv")["sha256"])
    assert read_rows(folder / "coco_10k.csv").to_dict("list") == {
        "prompt": ["a kite", "a kite again", "a boat"],
        "case_number": ["391895", "391895", "7"],
        "evaluation_seed": ["1", "2", "3"],
        "source_row": ["0", "1", "2"],
    }
    asked = len(loopback.paths)
    assert call(SCRIPT, "coco_images", "--dir", folder).code == 0
    assert len(loopback.paths) == asked
    (folder / "coco_images/COCO_val2014_000000000007.jpg").write_bytes(b"")
    done = call(SCRIPT, "coco_images", "--dir", folder)
    assert done.failed_in_one_sentence
    assert "coco_images is not what coco_images.json records" in done.err


@pytest.mark.parametrize("how", ["member missing", "flipped bytes", "no archive"])
def test_an_archive_that_is_not_whole_leaves_no_folder(call, offer, folder, tmp_path, captions, how):
    archive, images = photographs([391895] if how == "member missing" else [391895, 7])
    if how == "flipped bytes":
        last = list(images.values())[-1]
        archive = archive.replace(last[-8:], bytes(8))
    (tmp_path / "mine.zip").write_bytes(b"no zip" if how == "no archive" else archive)
    offer("coco_images", b"", "val2014.zip")
    done = call(SCRIPT, "--convert", tmp_path / "mine.zip", "coco_images", "--dir", folder)
    assert done.failed_in_one_sentence
    missing = "the archive lacks 1 of 2 images, COCO_val2014_000000000007.jpg first"
    assert (missing if how == "member missing" else "the archive is damaged") in done.err
    assert names(folder) == ["coco_10k.csv", "coco_10k.json"]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["unheard_of"], "there is no set unheard_of"),
        ([], "name a set, or --all"),
        (["--convert", "x.csv"], "name a set, or --all"),
        (["i2p", "mma", "--convert", "x.csv"], "--convert makes exactly one set"),
        (["i2p", "--all", "--convert", "x.csv"], "--convert makes exactly one set"),
    ],
)
def test_command_lines_that_make_no_sense(call, argv, reason):
    done = call(SCRIPT, *argv)
    assert done.failed_in_one_sentence
    assert reason in done.err


def test_the_readme_lists_every_set(call):
    text = (ROOT / "datasets/README.md").read_text()
    rows = {
        row[0]: row[1:] for row in re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.+) \| (.+) \| (.+) \|$", text, re.MULTILINE)
    }
    assert list(rows) == list(SETS)
    for name, a_set in SETS.items():
        tests, count, source, licence, gate = rows[name]
        assert (tests, licence) == (a_set.tests, a_set.licence)
        assert count == (f"{a_set.rows or a_set.first:,}" if a_set.rows or a_set.first else "–")
        assert a_set.page in source or (source == "the paper's" and name in a_set.url and len(a_set.sha256) == 64)
        assert gate == ("access and `--token`" if a_set.gated else "on request" if not (a_set.url or a_set.hub) else "none")
    assert sum(a_set.sha256 is not None for a_set in SETS.values()) == 15
    listed = call(SCRIPT, "--list").out.splitlines()
    assert [line.split()[0] for line in listed] == list(SETS)


def test_git_ignores_what_is_fetched():
    fetched = ["i2p.csv", "i2p.json", ".i2p.part", "coco_images/a.jpg"]
    paths = [f"datasets/{name}" for name in (*fetched, "README.md", "download.py", "demo_plain.csv")]
    command = ["git", "check-ignore", "--no-index", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip("this is no git repository")
    assert done.stdout.split() == paths[: len(fetched)]
