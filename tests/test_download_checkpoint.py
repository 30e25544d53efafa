"""scripts/download_checkpoint.py against a server on loopback that cuts connections and sends what it should not."""

import importlib.util
import json
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from des.cli import UserError

import pytest
import torch
from conftest import ROOT


class Server(ThreadingHTTPServer):
    """Serves `content`; `cut` ends that many answers after `after` bytes."""

    content, etag, cut, after, status, ranges_work = b"", '"one"', 0, 0, 200, True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        asked = self.headers["Range"]
        server.asked.append(asked)
        if server.status != 200:
            return self.send_error(server.status)
        partial = asked and server.ranges_work and self.headers["If-Range"] == server.etag
        body = server.content[int(asked.removeprefix("bytes=").removesuffix("-")) :] if partial else server.content
        self.send_response(206 if partial else 200)
        self.send_header("Content-Length", str(len(body)))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        if server.cut:
            server.cut -= 1
            body = body[: server.after]
        self.wfile.write(body)


@pytest.fixture
def server(tmp_path):
    torch.save(
        {"model_state_dict": {"weight": torch.randn(300, 300, generator=torch.Generator().manual_seed(0))}},
        tmp_path / "source.pt",
    )
    server = Server()
    server.content = (tmp_path / "source.pt").read_bytes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def script(server, monkeypatch):
    spec = importlib.util.spec_from_file_location("download_checkpoint", ROOT / "scripts/download_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PAUSE", 0)
    url = f"http://127.0.0.1:{server.server_port}/des.pt"
    monkeypatch.setattr(
        module, "PUBLISHED", {name: module.Published(url, it.trains, it.goes_to) for name, it in module.PUBLISHED.items()}
    )
    return module


def test_a_download_is_recorded_and_not_repeated(script, server, tmp_path, capsys):
    script.main(["des_t5", "--dir", str(tmp_path / "c")])
    digest = sha256(server.content).hexdigest()
    assert (tmp_path / "c/des_t5.pt").read_bytes() == server.content
    assert json.loads((tmp_path / "c/des_t5.json").read_text())["sha256"] == digest
    said = capsys.readouterr().out
    assert (
        digest in said
        and "FLUX.1: generate.py --training_method des --text_encoder_2_path" in said
        and "--text_encoder_3_path" in said
    )
    script.main(["des_t5", "--dir", str(tmp_path / "c")])
    assert server.asked == [None]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["des_t5.json", "des_t5.pt"]


@pytest.mark.parametrize("ranges_work", [True, False])
def test_a_cut_connection_continues(script, server, tmp_path, ranges_work):
    server.cut, server.after, server.ranges_work = 1, 100_000, ranges_work
    script.main(["des", "--dir", str(tmp_path / "c")])
    assert server.asked == [None, "bytes=100000-"]
    assert (tmp_path / "c/des.pt").read_bytes() == server.content


def test_a_later_run_asks_only_for_the_rest(script, server, tmp_path):
    server.cut, server.after = 4, 50_000
    with pytest.raises(UserError, match="run this again to continue"):
        script.main(["des", "--dir", str(tmp_path / "c")])
    assert not (tmp_path / "c/des.pt").exists()
    server.asked.clear()
    script.main(["des", "--dir", str(tmp_path / "c")])
    assert server.asked == ["bytes=200000-"]
    assert (tmp_path / "c/des.pt").read_bytes() == server.content


def test_a_file_that_changed_meanwhile_starts_anew(script, server, tmp_path):
    server.cut, server.after = 4, 50_000
    with pytest.raises(UserError):
        script.main(["des", "--dir", str(tmp_path / "c")])
    torch.save({"model_state_dict": {"weight": torch.ones(300, 300)}}, tmp_path / "source.pt")
    server.content, server.etag = (tmp_path / "source.pt").read_bytes(), '"two"'
    script.main(["des", "--dir", str(tmp_path / "c")])
    assert (tmp_path / "c/des.pt").read_bytes() == server.content


@pytest.mark.parametrize("content", [b"<html>not found</html>", b""])
def test_what_is_no_checkpoint_is_not_kept(script, server, tmp_path, content):
    server.content = content
    with pytest.raises(UserError, match="no checkpoint of tensors"):
        script.main(["des", "--dir", str(tmp_path / "c")])
    assert list((tmp_path / "c").iterdir()) == []


def test_refusals(script, server, tmp_path):
    folder = tmp_path / "c"
    server.status = 404
    with pytest.raises(UserError, match="answered 404"):
        script.main(["des", "--dir", str(folder)])
    server.status = 200
    script.main(["des", "--dir", str(folder)])
    whole = (folder / "des.pt").read_bytes()
    (folder / "des.pt").write_bytes(whole[:-1])
    with pytest.raises(UserError, match="not the file that"):
        script.main(["des", "--dir", str(folder)])
    (folder / "des.pt").unlink()
    torch.save({"model_state_dict": {"weight": torch.ones(3)}}, tmp_path / "source.pt")
    server.content = (tmp_path / "source.pt").read_bytes()
    with pytest.raises(UserError, match="has changed"):
        script.main(["des", "--dir", str(folder)])
    assert [path.name for path in folder.iterdir()] == ["des.json"]
    (folder / "des.pt").write_bytes(whole)
    (folder / "des.json").unlink()
    with pytest.raises(UserError, match="without its record"):
        script.main(["des", "--dir", str(folder)])


def test_no_network_is_one_sentence(script, server, tmp_path, monkeypatch):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="could not be downloaded from"):
        script.main(["des", "--dir", str(tmp_path / "c")])
