"""Fetch the published checkpoints, and say where each of them goes.

    python scripts/download_checkpoint.py des des_t5 --dir checkpoints/published

An interrupted download continues where it stopped (.NAME.pt.part). No checksums were published: the first download's sha256 is
recorded in NAME.json beside NAME.pt, and a later one must have it too.
"""

import argparse
import datetime
import http.client
import json
import re
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from des import cli
from des.cli import UserError, logger, progress
from des.loading import read_pt
from des.results import sha256_file, write_json

from torch import Tensor

TRIES = 4
PAUSE = 3.0  # seconds between them
CHUNK = 2**20


@dataclass(frozen=True)
class Published:
    """One checkpoint: its link, what it was trained on, and the option of generate.py that takes it, by model."""

    url: str
    trains: str
    pipelines: dict[str, str]


_SD1 = {"SD v1.x": "--text_encoder_path"}
_DROPBOX = "https://www.dropbox.com/scl/fi/"
PUBLISHED = {
    "des": Published(
        _DROPBOX + "mjvrq2oynmawvjbkkxpau/des.pt?rlkey=vb2bnt8fh8zm3qpbssoq7fziw&st=9c364ns3&dl=1",
        "CLIP-L/14, sexual",
        _SD1 | {"SD v3.x": "--text_encoder_path", "FLUX.1": "--text_encoder_path"},
    ),
    "des_clipg": Published(
        _DROPBOX + "qlmzjv33tmivnpu1qv5sa/des_clipg.pt?rlkey=2feesjw0qrk3c4vgo2el7foao&st=9qtfzfbi&dl=1",
        "CLIP-G/14, sexual",
        {"SD v3.x": "--text_encoder_2_path"},
    ),
    "des_t5": Published(
        _DROPBOX + "sofnetmz780jnnxqf3hr0/des_t5.pt?rlkey=3lpreqkc8nuggvezbfeyekgwz&st=yrpdxa8a&dl=1",
        "T5-XXL, sexual",
        {"SD v3.x": "--text_encoder_3_path", "FLUX.1": "--text_encoder_2_path"},
    ),
    "des_multi": Published(
        _DROPBOX + "yvtdbuwmtlskfqh8mefil/des_multi.pt?rlkey=vwnk46lc7rdfapc7panope0hj&st=r3ujh1ne&dl=1",
        "CLIP-L/14, sexual + violence + illegal",
        _SD1,
    ),
    "des_vangogh": Published(
        _DROPBOX + "fk5xbd8u06szf2a1por7e/des_vangogh.pt?rlkey=lxkjk67a5336twz25oju846sx&st=ugbxo5bf&dl=1",
        "CLIP-L/14, Van Gogh",
        _SD1,
    ),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("names", nargs="+", choices=(*PUBLISHED, "all"), help="which, or all")
    parser.add_argument("--dir", type=Path, default=Path("checkpoints/published"), metavar="DIR", help="where they go")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cli.setup_logging()
    for name in PUBLISHED if "all" in args.names else dict.fromkeys(args.names):
        published = PUBLISHED[name]
        path = fetch(name, published, args.dir)
        print(f"{path} ({published.trains}) sha256 {sha256_of(path)}")
        for model, option in published.pipelines.items():
            print(f"  for {model}: generate.py --training_method des {option} {path}")


def fetch(name: str, published: Published, folder: Path) -> Path:
    """Download one checkpoint unless it is there, check and record it; returns its path. Raises UserError."""
    path, record, part = folder / f"{name}.pt", folder / f"{name}.json", folder / f".{name}.pt.part"
    known = sha256_of(path) if record.exists() else None
    if path.exists():
        if known is None:
            raise UserError(f"{path} is there without its record {record.name}; move it away to download it again")
        if sha256_file(path) != known:
            raise UserError(f"{path} is not the file that {record.name} records; move both away to download it again")
        logger.info("%s is there already", path)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    download(name, published.url, part)
    if not is_checkpoint(part):
        _discard(part)
        raise UserError(f"what came for {name} is no whole checkpoint of tensors with `model_state_dict`; it was not kept")
    digest = sha256_file(part)
    if known not in (None, digest):
        _discard(part)
        raise UserError(f"{name} has changed: its sha256 is {digest}, and {record} records {known}; it was not kept")
    if known is None:
        facts = {"name": name, "url": published.url, "bytes": part.stat().st_size, "sha256": digest}
        facts |= {"date": datetime.date.today().isoformat(), "trains": published.trains, "pipelines": published.pipelines}
        write_json(record, facts)
    part.replace(path)
    _discard(part)
    return path


def is_checkpoint(path: Path) -> bool:
    """Whether it is a torch zip of tensors with `model_state_dict`, and whole: torch does not look at the zip's checksums."""
    content = read_pt(path) if zipfile.is_zipfile(path) else None
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError):
        return False


def sha256_of(path: Path) -> str:
    """The hash that the record of a checkpoint names."""
    record = path.with_suffix(".json")
    try:
        return json.loads(record.read_text(encoding="utf-8"))["sha256"].lower()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{record} is no record that can be read; move it away") from None


def download(name: str, url: str, part: Path) -> None:
    """Bring `part` to its full length, with further tries where the connection breaks; UserError when they are used up."""
    host = urlsplit(url).netloc
    for left in reversed(range(TRIES)):
        try:
            return _continue(name, url, part)
        except urllib.error.HTTPError as error:
            raise UserError(f"{name} could not be downloaded: {host} answered {error.code} {error.reason}") from None
        except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException) as error:
            if not left:
                reason = getattr(error, "reason", error)
                raise UserError(f"{name} could not be downloaded from {host} ({reason}); run this again to continue") from None
            logger.info("%s: the connection to %s broke; trying again", name, host)
            time.sleep(PAUSE)


def _continue(name: str, url: str, part: Path) -> None:
    """Ask for the rest of the file, if it has not changed since, and append it; ConnectionError where it ends early."""
    tag_file = _tag_file(part)
    have = part.stat().st_size if part.exists() else 0
    tag = tag_file.read_text(encoding="utf-8") if have and tag_file.exists() else ""
    headers = {"Range": f"bytes={have}-"} if have else {}
    if tag and not tag.startswith("W/"):  # a weak tag never matches in If-Range
        headers["If-Range"] = tag
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        same = error.headers["ETag"] in (None, tag)
        if same and error.headers["Content-Range"] == f"bytes */{have}":
            return  # the part was complete
        _discard(part)
        raise ConnectionError(f"the host has no bytes after {have}") from None
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise UserError(
                f"{urlsplit(url).netloc} sent a page instead of {name}; open {url} in a browser to see what it says"
            )
        start, total = _extent(answer)
        new_tag = answer.headers["ETag"] or ""
        if start not in (0, have) or (start and new_tag not in ("", tag)):
            _discard(part)
            raise ConnectionError("the host sent another part than was asked for")
        bar = progress(None, desc=name, total=total, initial=start, unit="B", unit_scale=True)
        with part.open("ab" if start else "wb") as file, bar:
            if not start:  # only now that the old bytes are gone
                tag_file.write_text(new_tag, encoding="utf-8")
            for chunk in _chunks(answer):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.stat().st_size != total:
        raise ConnectionError(f"{part.stat().st_size} of {total} bytes came")


def _extent(answer: http.client.HTTPResponse) -> tuple[int, int | None]:
    """Where in the file an answer begins, and the length of the whole file where the server tells."""
    length = answer.headers["Content-Length"]
    if answer.status != 206:
        return 0, None if length is None else int(length)
    sent = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers["Content-Range"] or "")
    if sent is None:
        raise ConnectionError("the host does not say which part it sent")
    return int(sent[1]), int(sent[2]) + 1 if sent[3] == "*" else int(sent[3])


def _chunks(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """The body; whatever breaks while it comes is a ConnectionError, so that a full disk is not taken for one."""
    try:
        while chunk := answer.read1(CHUNK):
            yield chunk
    except OSError as error:
        raise ConnectionError(str(error)) from None


def _tag_file(part: Path) -> Path:
    return part.with_suffix(".etag")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag_file(part).unlink(missing_ok=True)


if __name__ == "__main__":
    cli.run(main)
