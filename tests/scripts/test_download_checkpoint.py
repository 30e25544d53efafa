"""scripts/download_checkpoint.py against a server on loopback that cuts connections and sends what it should not."""

import errno
import importlib.util
import json
import sys
from dataclasses import replace
from hashlib import sha256
from http.client import HTTPResponse
from pathlib import Path

from des.utils.errors import UserError

import pytest
import torch
from conftest import ROOT, snapshot
from loopback import names


def saved(content: object, folder: Path) -> bytes:
    """The bytes of a .pt file."""
    torch.save(content, folder / "source.pt")
    return (folder / "source.pt").read_bytes()


@pytest.fixture
def server(loopback, tmp_path):
    weight = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    loopback.content = saved({"model_state_dict": {"weight": weight}}, tmp_path)
    return loopback


@pytest.fixture
def script(server, monkeypatch):
    spec = importlib.util.spec_from_file_location("download_checkpoint", ROOT / "scripts/download_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    url = f"{server.url}/des.pt"
    monkeypatch.setattr(module, "PUBLISHED", {name: replace(it, url=url, sha256=None) for name, it in module.PUBLISHED.items()})
    return module


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "c"


@pytest.fixture
def interrupted(script, server, folder) -> Path:
    """The part that a run left whose four connections were each cut after 50000 bytes."""
    server.cut, server.after = 4, 50_000
    with pytest.raises(UserError, match="run this command again to continue"):
        script.main(["des", "--dir", str(folder)])
    assert names(folder) == [".des.pt.etag", ".des.pt.part"]
    server.asked.clear(), server.sent.clear()
    return folder / ".des.pt.part"


def test_a_download_is_recorded_and_not_repeated(script, server, folder, capsys):
    script.main(["des_t5", "--dir", str(folder)])
    digest = sha256(server.content).hexdigest()
    assert (folder / "des_t5.pt").read_bytes() == server.content
    record = json.loads((folder / "des_t5.json").read_text())
    assert record == {
        "name": "des_t5",
        "url": script.PUBLISHED["des_t5"].url,
        "bytes": len(server.content),
        "sha256": digest,
        "date": record["date"],
        "trains": "T5-XXL, sexual",
        "pipelines": {"SD v3.x": "--text_encoder_3_path", "FLUX.1": "--text_encoder_2_path"},
    }
    said = capsys.readouterr().out
    assert digest in said
    for model, option in record["pipelines"].items():
        assert f"{model}: generate.py --training_method des {option} {folder / 'des_t5.pt'}" in said
    script.main(["des_t5", "--dir", str(folder)])
    assert server.asked == [None]
    assert names(folder) == ["des_t5.json", "des_t5.pt"]


def test_all_fetches_each(script, server, folder):
    script.main(["all", "--dir", str(folder)])
    assert names(folder) == sorted(f"{name}.{suffix}" for name in script.PUBLISHED for suffix in ("json", "pt"))


def test_one_that_fails_does_not_stop_the_others(script, server, folder):
    content, other = server.content, script.PUBLISHED["des"]
    server.files = {"/des.pt": content}
    script.PUBLISHED["des"] = replace(other, url=f"{server.url}/gone.pt")
    with pytest.raises(UserError, match=r"1 of 2 files could not be downloaded: des$"):
        script.main(["des", "des_t5", "--dir", str(folder)])
    assert names(folder) == ["des_t5.json", "des_t5.pt"]


def test_q16_s_prompts_have_their_published_hash(script, server, folder, capsys):
    server.content = b"embeddings"
    known = replace(script.PUBLISHED["q16_prompts"], sha256=sha256(server.content).hexdigest())
    script.PUBLISHED["q16_prompts"] = replace(known, sha256="0" * 64)
    with pytest.raises(UserError, match="does not have the published sha256 0000"):
        script.main(["q16_prompts", "--dir", str(folder)])
    assert names(folder) == []
    script.PUBLISHED["q16_prompts"] = known
    script.main(["q16_prompts", "--dir", str(folder)])
    path = folder / "q16_prompts.pt"
    assert path.read_bytes() == server.content
    assert f"tasks/img_batch_classify_q16.py --prompts_file {path}" in capsys.readouterr().out


def test_without_a_name_the_choices_are_shown(call):
    done = call("scripts/download_checkpoint.py")
    assert done.failed_in_one_sentence
    assert "{des,des_clipg,des_t5,des_multi,des_vangogh,q16_prompts,all}" in done.err


@pytest.mark.parametrize("etag", ['"one"', ""])
def test_a_cut_connection_continues(script, server, folder, etag):
    server.cut, server.after, server.etag = 1, 100_000, etag
    script.main(["des", "--dir", str(folder)])
    assert server.asked == [None, "bytes=100000-"]
    assert server.sent == [100_000, len(server.content) - 100_000]
    assert (folder / "des.pt").read_bytes() == server.content


def test_a_truncated_file_of_unknown_length_is_detected(script, server, folder):
    server.cut, server.after, server.chunked = 1, 100_000, True
    script.main(["des", "--dir", str(folder)])
    assert server.sent == [100_000, len(server.content) - 100_000]
    assert (folder / "des.pt").read_bytes() == server.content


def test_a_route_that_is_lost_on_the_way_is_a_broken_connection(script, server, folder, monkeypatch):
    whole_read, failures = HTTPResponse.read1, [OSError(errno.EHOSTUNREACH, "No route to host")]

    def read(answer, size):
        if failures:
            raise failures.pop()
        return whole_read(answer, size)

    monkeypatch.setattr(HTTPResponse, "read1", read)
    script.main(["des", "--dir", str(folder)])
    assert server.asked == [None, None]
    assert (folder / "des.pt").read_bytes() == server.content


def test_a_server_without_ranges_starts_from_scratch(script, server, folder):
    server.cut, server.after, server.ranges_work = 1, 100_000, False
    script.main(["des", "--dir", str(folder)])
    assert server.sent == [100_000, len(server.content)]
    assert (folder / "des.pt").read_bytes() == server.content


def test_a_later_run_asks_only_for_the_rest(script, server, folder, interrupted):
    script.main(["des", "--dir", str(folder)])
    assert server.asked == ["bytes=200000-"]
    assert server.sent == [len(server.content) - 200_000]
    assert (folder / "des.pt").read_bytes() == server.content
    assert names(folder) == ["des.json", "des.pt"]


def test_a_complete_part_is_not_fetched_again(script, server, folder, interrupted):
    interrupted.write_bytes(server.content)
    script.main(["des", "--dir", str(folder)])
    assert server.asked == [f"bytes={len(server.content)}-"]
    assert server.sent == [0]
    assert (folder / "des.pt").read_bytes() == server.content


def test_a_part_that_is_too_long_starts_from_scratch(script, server, folder, interrupted):
    interrupted.write_bytes(server.content + b"more")
    script.main(["des", "--dir", str(folder)])
    assert server.asked == [f"bytes={len(server.content) + 4}-", None]
    assert (folder / "des.pt").read_bytes() == server.content


def test_a_complete_part_of_another_file_starts_from_scratch(script, server, folder, interrupted):
    interrupted.write_bytes(bytes(len(server.content)))
    interrupted.with_suffix(".etag").write_text('W/"one"')
    server.etag = 'W/"two"'
    script.main(["des", "--dir", str(folder)])
    assert server.asked == [f"bytes={len(server.content)}-", None]
    assert (folder / "des.pt").read_bytes() == server.content


@pytest.mark.parametrize("content_range", ["bytes 7-{last}/{whole}", "nonsense"])
def test_another_range_than_was_asked_for_is_never_appended(script, server, folder, interrupted, content_range):
    server.content_range = content_range
    if content_range == "nonsense":
        with pytest.raises(UserError, match="does not say which part"):
            script.main(["des", "--dir", str(folder)])
        assert interrupted.read_bytes() == server.content[:200_000]
    else:
        script.main(["des", "--dir", str(folder)])
        assert server.asked == ["bytes=200000-", None]
        assert (folder / "des.pt").read_bytes() == server.content


@pytest.mark.parametrize("etag", ['"two"', 'W/"two"'])
def test_a_file_that_changed_meanwhile_starts_from_scratch(script, server, tmp_path, folder, interrupted, etag):
    if etag.startswith("W/"):  # a weak tag is not sent, so that the answer's own must tell
        interrupted.with_suffix(".etag").write_text('W/"one"')
    server.content, server.etag = saved({"model_state_dict": {"weight": torch.ones(300, 300)}}, tmp_path), etag
    script.main(["des", "--dir", str(folder)])
    assert (folder / "des.pt").read_bytes() == server.content


def test_two_files_in_one_part_are_refused(script, server, tmp_path, folder, interrupted):
    """Without an ETag nothing shows that the file changed; the checksums inside it do."""
    interrupted.with_suffix(".etag").write_text("")
    server.content, server.etag = saved({"model_state_dict": {"weight": torch.ones(300, 300)}}, tmp_path), ""
    with pytest.raises(UserError, match="not a complete checkpoint"):
        script.main(["des", "--dir", str(folder)])
    assert server.asked == ["bytes=200000-"]
    assert names(folder) == []


@pytest.mark.parametrize(
    "content",
    [b"<html>not found</html>", b"", {"weight": torch.ones(3)}, {"model_state_dict": {}}, {"model_state_dict": {"lr": 0.1}}],
)
def test_what_is_no_checkpoint_is_not_kept(script, server, tmp_path, folder, content):
    server.content = content if isinstance(content, bytes) else saved(content, tmp_path)
    with pytest.raises(UserError, match="not a complete checkpoint"):
        script.main(["des", "--dir", str(folder)])
    assert names(folder) == []


def test_a_page_leaves_the_part_as_it_is(script, server, folder, interrupted):
    before = snapshot(folder)
    server.content, server.etag, server.kind = b"<html>gone</html>", "", "text/html; charset=utf-8"
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+ sent a web page instead of des;"):
        script.main(["des", "--dir", str(folder)])
    assert snapshot(folder) == before


def test_a_status_that_is_an_error_names_host_and_file(script, server, folder):
    server.status = 404
    with pytest.raises(UserError, match=r"^des could not be downloaded: 127\.0\.0\.1:\d+ answered 404 Not Found$"):
        script.main(["des", "--dir", str(folder)])
    assert server.asked == [None]
    assert names(folder) == []


def test_what_differs_from_the_record_is_refused(script, server, tmp_path, folder):
    script.main(["des", "--dir", str(folder)])
    whole, record = snapshot(folder)["des.pt"], snapshot(folder)["des.json"]
    (folder / "des.pt").write_bytes(whole[:-1])
    with pytest.raises(UserError, match="not the file that"):
        script.main(["des", "--dir", str(folder)])
    assert server.asked == [None]
    (folder / "des.pt").unlink()
    server.content = saved({"model_state_dict": {"weight": torch.ones(3)}}, tmp_path)
    with pytest.raises(UserError, match="has changed"):
        script.main(["des", "--dir", str(folder)])
    assert snapshot(folder) == {"des.json": record}
    server.content = whole
    script.main(["des", "--dir", str(folder)])
    assert snapshot(folder) == {"des.json": record, "des.pt": whole}


def test_a_file_without_record_is_refused(script, server, folder):
    folder.mkdir()
    (folder / "des.pt").write_bytes(server.content)
    with pytest.raises(UserError, match="without its record"):
        script.main(["des", "--dir", str(folder)])
    assert snapshot(folder) == {"des.pt": server.content}
    assert server.asked == []


def test_no_network_is_one_sentence(script, server, folder):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"^des could not be downloaded from 127\.0\.0\.1:\d+ "):
        script.main(["des", "--dir", str(folder)])
    assert names(folder) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_not_taken_for_a_broken_connection(script, server, folder):
    folder.mkdir()
    (folder / ".des.pt.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        script.main(["des", "--dir", str(folder)])
    assert server.asked == [None]
