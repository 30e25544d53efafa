"""A server on loopback that cuts connections, asks for tokens and sends what it should not."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """Serves `files` by path, and `content` at every path where there are none.

    `cut` ends that many answers after `after` bytes. `redirects` maps paths to addresses, and the paths of `gated` open to one
    `token` only. `busy` answers come first, each a status and a Retry-After. `asked`, `sent`, `paths` and `tokens` are each
    request's Range, bytes, path and Authorization.
    """

    content, etag, cut, after, status, ranges_work, kind, chunked = b"", '"one"', 0, 0, 200, True, "application/binary", False
    content_range = "bytes {start}-{last}/{whole}"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []
        self.sent: list[int] = []
        self.paths: list[str] = []
        self.tokens: list[str | None] = []
        self.files: dict[str, bytes] = {}
        self.busy: list[tuple[int, str]] = []
        self.redirects: dict[str, str] = {}
        self.gated: set[str] = set()
        self.token = "hf_opensesame"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, self.close_connection = self.server, True
        path, token, asked = self.path.split("?")[0], self.headers["Authorization"], self.headers["Range"]
        server.paths.append(path)
        server.tokens.append(token)
        server.asked.append(asked)
        if server.busy:
            return self.busy(*server.busy.pop(0))
        if server.status != 200:
            return self.send_error(server.status)
        if path in server.gated and token != f"Bearer {server.token}":
            return self.send_error(403 if token else 401)
        if path in server.redirects:
            return self.redirect(server.redirects[path])
        content = server.files.get(path) if server.files else server.content
        if content is None:
            return self.send_error(404)
        whole = len(content)
        partial = asked and server.ranges_work and self.headers["If-Range"] in (None, server.etag)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if partial else 0
        status = 200 if not partial else 206 if start < whole else 416
        body = content[start:]
        content_range = server.content_range.format(start=start, last=whole - 1, whole=whole)
        self.send_response(status)
        self.send_header("Content-Type", server.kind)
        self.send_header(*(("Transfer-Encoding", "chunked") if server.chunked else ("Content-Length", str(len(body)))))
        if partial:
            self.send_header("Content-Range", content_range if body else f"bytes */{whole}")
        if server.etag:
            self.send_header("ETag", server.etag)
        sent = body
        if server.cut:
            server.cut -= 1
            sent = body[: server.after]
        server.sent.append(len(sent))  # before anything goes out, so that a test that has its answer finds it
        self.end_headers()
        if server.chunked:
            sent = f"{len(body):x}\r\n".encode() + sent + b"\r\n0\r\n\r\n" * (len(sent) == len(body))
        self.wfile.write(sent)

    def busy(self, status: int, retry_after: str):
        self.send_response(status)
        self.send_header("Retry-After", retry_after)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def redirect(self, url: str):
        self.send_response(302)
        self.send_header("Location", url)
        self.send_header("Content-Length", "0")
        self.end_headers()


def names(folder: Path) -> list[str]:
    """The files of a folder but for locks; none where there is no folder."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") if folder.exists() else []
