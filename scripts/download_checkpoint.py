"""Download the published checkpoints and Q16's prompts, and print the option that takes each of them.

    python scripts/download_checkpoint.py des des_t5 --dir checkpoints/published

An interrupted download resumes where it stopped (.NAME.pt.part). No hashes of the checkpoints are published: the sha256 of the
first download is recorded in NAME.json beside NAME.pt, and a later download must have the same. The sha256 of Q16's prompts is known.
"""

import argparse
import datetime
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from des.utils import cli


@dataclass(frozen=True)
class Published:
    """A published file: its URL, what it was trained on, and the option that takes it, by model (for generate.py) or by script.

    `sha256` is given for a file that is not a DES checkpoint; checkpoints are checked by their content.
    """

    url: str
    trains: str
    pipelines: dict[str, str]
    sha256: str | None = None


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
    "q16_prompts": Published(
        "https://raw.githubusercontent.com/YitingQu/unsafe-diffusion/main/checkpoints/finetuned_q16/prompts.pt",
        "Q16's prompt embeddings, fine-tuned by unsafe-diffusion",
        {"tasks/img_batch_classify_q16.py": "--prompts_file"},
        sha256="d4a75115309f5379daa13afc4f1d3def476274a08cbf582dcdd0f4c2d60b0125",
    ),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "names",
        nargs="+",
        choices=(*PUBLISHED, "all"),
        metavar=f"{{{','.join((*PUBLISHED, 'all'))}}}",
        help="files to download",
    )
    # fmt: off
    parser.add_argument("--dir", type=cli.output_folder, default=Path("checkpoints/published"), metavar="DIR", help="folder to download to")
    # fmt: on
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.data.downloads import discard, download, for_each, recorded
from des.models.loading import read_pt
from des.utils import cli, logs
from des.utils.errors import UserError
from des.utils.files import sha256_file, write_json
from des.utils.locks import locked
from des.utils.logs import logger

from torch import Tensor


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logs.setup_logging()

    def fetch_one(name: str) -> None:
        published = PUBLISHED[name]
        with locked(args.dir / f".{name}.lock", name):
            path = fetch(name, published, args.dir)
        print(f"{path} ({published.trains}) sha256 {recorded(path.with_suffix('.json'))}")
        for model, option in published.pipelines.items():
            script = f"  {model}" if published.sha256 else f"  for {model}: generate.py --training_method des"
            print(f"{script} {option} {path}")

    for_each(list(PUBLISHED) if "all" in args.names else list(dict.fromkeys(args.names)), fetch_one, "files")


def fetch(name: str, published: Published, folder: Path) -> Path:
    """Download a file unless it exists, check and record it; returns its path. Raises UserError if a check fails."""
    path, record, part = folder / f"{name}.pt", folder / f"{name}.json", folder / f".{name}.pt.part"
    known = recorded(record) if record.exists() else None
    if path.exists():
        if known is None:
            raise UserError(f"{path} exists without its record {record.name}; move it away to download it again")
        if sha256_file(path) != known:
            raise UserError(f"{path} is not the file that {record.name} records; move both away to download it again")
        logger.info("%s exists already", path)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    download(name, published.url, part)
    if published.sha256 and sha256_file(part) != published.sha256:
        discard(part)
        raise UserError(f"the file received for {name} does not have the published sha256 {published.sha256}; it was not kept")
    if not published.sha256 and not is_checkpoint(part):
        discard(part)
        raise UserError(f"the file received for {name} is not a complete checkpoint with `model_state_dict`; it was not kept")
    digest = sha256_file(part)
    if known not in (None, digest):
        discard(part)
        raise UserError(f"{name} has changed: its sha256 is {digest}, and {record} records {known}; it was not kept")
    if known is None:
        facts = {"name": name, "url": published.url, "bytes": part.stat().st_size, "sha256": digest}
        facts |= {"date": datetime.date.today().isoformat(), "trains": published.trains, "pipelines": published.pipelines}
        write_json(record, facts)
    part.replace(path)
    discard(part)
    return path


def is_checkpoint(path: Path) -> bool:
    """Whether it is an undamaged torch zip with `model_state_dict`."""
    content = read_pt(path) if zipfile.is_zipfile(path) else None
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    return isinstance(state, dict) and bool(state) and all(isinstance(tensor, Tensor) for tensor in state.values())


if __name__ == "__main__":
    cli.run(main)
