"""Resumable downloads, recorded hashes, and finding the file of a data set on the hub.

`huggingface_hub.http_get` is not used because it neither sends If-Range nor checks Content-Range: if a file changed on the
server between two attempts, the result would mix both versions.
"""

import hashlib
import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from des.utils.errors import UserError
from des.utils.files import sha256_file
from des.utils.logs import logger, progress

from huggingface_hub import DatasetInfo, HfApi, constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

TRIES = 4
PAUSE = 3.0  # seconds between them
LONGEST_PAUSE = 60.0  # seconds that a server's Retry-After is followed for
BUSY = (429, 500, 502, 503, 504)  # HTTP statuses that are worth another attempt
AGAIN = "run this command again to continue"
CHUNK = 2**20


class Denied(UserError):
    """The host answered 401 or 403: the token is missing or not accepted."""


def for_each(names: Sequence[str], fetch: Callable[[str], None], what: str) -> None:
    """Call `fetch` for every name, also after a failure. Raises UserError that lists the names that failed."""
    failed = {}
    for name in names:
        try:
            fetch(name)
        except (UserError, OSError) as error:
            if len(names) == 1:
                raise
            failed[name] = error
    for name, error in failed.items():
        logger.error("%s: %s", name, error)
    if failed:
        raise UserError(f"{len(failed)} of {len(names)} {what} could not be downloaded: {', '.join(failed)}")


@dataclass(frozen=True)
class HubFile:
    """One file of a data set on the hub: its URL at a fixed revision, its published hash, and the licence on the card."""

    url: str
    digest: str
    licence: str | None


def hub_file(repo: str, suffixes: tuple[str, ...], token: str | None = None) -> HubFile:
    """Find the data file of a data set on the hub, in the first format of `suffixes` that it has.

    The host is `HF_ENDPOINT`. The hash is sha256 for large files and git's blob hash for small ones. Raises Denied for a gated
    set, and UserError if the hub cannot be reached or the set has no such file, or several.
    """
    try:
        info = _dataset_info(repo, token)
        files = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings}
    except HfHubHTTPError as error:
        status = error.response.status_code
        kind = Denied if status in (401, 403) else UserError
        again = f"; {AGAIN}" if status in BUSY else ""
        raise kind(f"{repo} could not be found: {urlsplit(constants.ENDPOINT).netloc} answered {status}{again}") from None
    except OfflineModeIsEnabled:
        raise UserError(f"{repo} could not be downloaded: HF_HUB_OFFLINE is set; unset it to download") from None
    except (OSError, HTTPError, ValueError, KeyError, TypeError, ImportError) as error:  # the last for a SOCKS proxy
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{repo} could not be looked up at {urlsplit(constants.ENDPOINT).netloc}: {reason}") from None
    for suffix in suffixes:
        found = sorted(name for name in files if PurePosixPath(name).suffix.lower() == suffix)
        if len(found) > 1:
            raise UserError(f"{repo} has {len(found)} {suffix} files ({found[0]}, …); download one and pass it to --convert")
        if found:
            url = hf_hub_url(repo, found[0], repo_type="dataset", revision=info.sha)
            return HubFile(url, files[found[0]], (info.card_data or {}).get("license"))
    raise UserError(f"{repo} has no file in one of the formats {', '.join(suffixes)}")


def _dataset_info(repo: str, token: str | None) -> DatasetInfo:
    """Return the hub's description of a data set, trying again while the hub is busy."""
    for left in reversed(range(TRIES)):
        try:
            return HfApi(token=token or False).dataset_info(repo, files_metadata=True)  # False: no token of this machine
        except HfHubHTTPError as error:
            if error.response.status_code not in BUSY or not left:
                raise
            _wait(repo, error.response.status_code, error.response.headers.get("Retry-After"))


def _wait(name: str, status: int, retry_after: str | None) -> None:
    """Wait before the next attempt for the time in the server's Retry-After (seconds or a date), at most LONGEST_PAUSE."""
    try:
        date = None if (retry_after or "0").strip().isdecimal() else parsedate_to_datetime(retry_after).timestamp()
        asked = float(retry_after or 0) if date is None else date - time.time()
    except (ValueError, TypeError):
        asked = 0.0
    pause = min(max(PAUSE, asked), LONGEST_PAUSE)
    logger.info("%s: the server answered %d; next attempt in %.0f seconds", name, status, pause)
    time.sleep(pause)


def has_digest(path: Path, digest: str) -> bool:
    """Whether a file matches a published hash: a sha256 (64 digits) or git's blob hash (40 digits)."""
    if len(digest) == 64:
        return sha256_file(path) == digest
    sha1 = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha1.update(chunk)
    return sha1.hexdigest() == digest


def recorded(record: Path, key: str = "sha256") -> str:
    """Return the hash in the JSON record beside a downloaded file; UserError if the record is damaged."""
    try:
        return json.loads(record.read_text(encoding="utf-8"))[key].lower()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{record} is not a readable record of a download; move it away to download again") from None


def download(name: str, url: str, part: Path, headers: Mapping[str, str] | None = None) -> None:
    """Download the rest of `part`, trying again if the connection breaks or the server is busy.

    `headers` are sent with every request, `Authorization` only to the host of `url`. Raises Denied for 401 and 403, and UserError
    for other errors and after the last attempt; the bytes received so far are kept for the next run.
    """
    host = urlsplit(url).netloc
    for left in reversed(range(TRIES)):
        try:
            return _continue(name, url, part, headers or {})
        except urllib.error.HTTPError as error:
            if error.code in BUSY and left:
                _wait(name, error.code, error.headers["Retry-After"])
                continue
            kind, again = Denied if error.code in (401, 403) else UserError, f"; {AGAIN}" if error.code in BUSY else ""
            raise kind(f"{name} could not be downloaded: {host} answered {error.code} {error.reason}{again}") from None
        except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException) as error:
            if not left:
                reason = getattr(error, "reason", error)
                raise UserError(f"{name} could not be downloaded from {host} ({reason}); {AGAIN}") from None
            logger.info("%s: the connection to %s broke; next attempt in %.0f seconds", name, host, PAUSE)
            time.sleep(PAUSE)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects without sending the token to another host, port or scheme."""

    def redirect_request(self, request, file, code, message, headers, url):
        further = super().redirect_request(request, file, code, message, headers, url)
        if further is not None and urlsplit(url)[:2] != urlsplit(request.full_url)[:2]:
            further.remove_header("Authorization")
        return further


def _continue(name: str, url: str, part: Path, headers: Mapping[str, str]) -> None:
    """Request the rest of the file unless it has changed, and append it; ConnectionError if the answer ends early."""
    tag_file = _tag_file(part)
    have = part.stat().st_size if part.exists() else 0
    tag = tag_file.read_text(encoding="utf-8") if have and tag_file.exists() else ""
    request = urllib.request.Request(url, headers=dict(headers) | ({"Range": f"bytes={have}-"} if have else {}))
    if tag and not tag.startswith("W/"):  # a weak tag never matches in If-Range
        request.add_header("If-Range", tag)
    try:
        answer = urllib.request.build_opener(_Redirects).open(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        same = error.headers["ETag"] in (None, tag)
        if same and error.headers["Content-Range"] == f"bytes */{have}":
            return  # the part was complete
        discard(part)
        raise ConnectionError(f"the host has no bytes after {have}") from None
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise UserError(f"{urlsplit(url).netloc} sent a web page instead of {name}; open {url} in a browser to see why")
        start, total = _extent(answer)
        new_tag = answer.headers["ETag"] or ""
        if start not in (0, have) or (start and new_tag not in ("", tag)):
            discard(part)
            raise ConnectionError("the host sent a different part than requested")
        bar = progress(None, desc=name, total=total, initial=start, unit="B", unit_scale=True)
        with part.open("ab" if start else "wb") as file, bar:
            if not start:  # only now that the old bytes are gone
                tag_file.write_text(new_tag, encoding="utf-8")
            for chunk in _chunks(answer):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.stat().st_size != total:
        raise ConnectionError(f"{part.stat().st_size} of {total} bytes arrived")


def _extent(answer: http.client.HTTPResponse) -> tuple[int, int | None]:
    """Return the offset at which an answer begins, and the length of the whole file, or None if the server does not state it."""
    length = answer.headers["Content-Length"]
    if answer.status != 206:
        return 0, None if length is None else int(length)
    sent = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers["Content-Range"] or "")
    if sent is None:
        raise ConnectionError("the host does not say which part it sent")
    return int(sent[1]), int(sent[2]) + 1 if sent[3] == "*" else int(sent[3])


def _chunks(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield the body. Read errors become ConnectionError, to distinguish them from the OSError of a full disk."""
    try:
        while chunk := answer.read1(CHUNK):
            yield chunk
    except OSError as error:
        raise ConnectionError(str(error)) from None


def _tag_file(part: Path) -> Path:
    return part.with_suffix(".etag")


def discard(part: Path) -> None:
    """Remove a partial download and its ETag."""
    part.unlink(missing_ok=True)
    _tag_file(part).unlink(missing_ok=True)
