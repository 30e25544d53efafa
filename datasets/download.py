"""Fetch the public prompt sets and COCO's reference images, and write each as one list with a `prompt` column.

    python datasets/download.py coco_prompts i2p_sexual_prompts --dir datasets

A set becomes NAME.csv, and NAME.json with its source, licence, date, rows and sha256. An interrupted download continues where it
stopped. What a set's owner gives on request only, or you have already, is turned by --convert FILE NAME. Gated sets need the token
of an account that has access: --token, or the variable HF_TOKEN.

Sets to generate from lose the prompts that put minors in a sexual context, and sexual ones all that name minors; NAME.json says how
many, and the column `source_row` keeps each row's number in the source, by which generate.py seeds it. Training sets keep every row: the encoder must learn to refuse them.
"""

import argparse
import datetime
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from des.data.prompt_sets import COPRO_SPLITS, SETS, PromptSet
from des.utils import choices, cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    # fmt: off
    sets = parser.add_argument_group("sets")
    sets.add_argument("names", nargs="*", metavar="NAME", help="which sets; --list names them")
    sets.add_argument("--all", action="store_true", help="every set that can be downloaded (COCO's archive alone has 6 GB)")
    sets.add_argument("--list", action="store_true", help="print the names, and what each set tests")
    sets.add_argument("--splits", nargs="+", choices=COPRO_SPLITS, metavar="S", help=f"which splits of CoPro become pairs ({', '.join(COPRO_SPLITS)}; default: {COPRO_SPLITS[0]})")
    files = parser.add_argument_group("files")
    files.add_argument("--convert", type=Path, metavar="FILE", help=f"make the one set NAME from this file ({' '.join(choices.TABLE_SUFFIXES)} .zip)")
    files.add_argument("--dir", type=cli.output_folder, metavar="DIR", help="output folder (default: this script's folder)")
    files.add_argument("--token", metavar="T", help="token of a Hugging Face account, for gated sets (or HF_TOKEN)")
    # fmt: on
    args = parser.parse_args(argv)
    args.dir = args.dir or Path(__file__).resolve().parent
    args.token = (args.token or os.environ.get("HF_TOKEN") or "").strip() or None
    unknown = [name for name in args.names if name not in SETS]
    if unknown:
        parser.error(f"there is no set {unknown[0]}; --list prints all names")
    if not args.names and not args.all and not args.list:
        parser.error("name a set, or --all")
    if args.convert and (len(args.names) != 1 or args.all):
        parser.error("--convert makes exactly one set; name it")
    if args.token and not re.fullmatch(r"[\x21-\x7e]+", args.token):  # else libraries would quote it in an error
        parser.error("the token contains characters that no token has; copy it again")
    return args


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from des.data.conversion import (
    Converted,
    convert_pairs,
    convert_prompts,
    extract_images,
    read_json,
    read_source,
    splits_of,
    write_rows,
)
from des.data.downloads import Denied, discard, download, for_each, has_digest, hub_file, recorded
from des.utils import cli, logs
from des.utils.errors import UserError, not_found
from des.utils.files import replacing, sha256_file, sha256_texts, write_json
from des.utils.folders import visible
from des.utils.locks import locked
from des.utils.logs import logger


@dataclass(frozen=True)
class Source:
    """The file that a set is made from, its format, and its facts for the record; `given` says that the user supplied it."""

    path: Path
    suffix: str
    facts: dict
    given: bool


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logs.setup_logging()
    if args.list:
        return print("\n".join(f"{name:<28} {a_set.tests}" for name, a_set in SETS.items()))
    every = [name for name, a_set in SETS.items() if a_set.url or a_set.hub] if args.all else []
    names = list(dict.fromkeys([*args.names, *every]))

    def obtain_one(name: str) -> None:
        with locked(args.dir / f".{name}.lock", name):
            obtain(name, args.dir, args.convert, args.token, args.splits or COPRO_SPLITS[:1])

    for_each(names, obtain_one, "sets")


def obtain(
    name: str,
    folder: Path,
    given: Path | None = None,
    token: str | None = None,
    splits: Sequence[str] = COPRO_SPLITS[:1],
) -> None:
    """Write one set unless it exists, from its public source or a `given` file, and print what was written. Raises UserError."""
    a_set = SETS[name]
    paths = [folder / (output if a_set.images_of else f"{output}.csv") for output in a_set.outputs(name)]
    wanted = [path for path in paths if not is_there(path)]
    splits = list(dict.fromkeys(splits))
    if not wanted:
        check_splits(paths, splits, default_too=False)
        if given:
            compare_with_records(name, from_user(given, a_set), paths)
        return logger.info("%s exists already", " and ".join(map(str, paths)))
    folder.mkdir(parents=True, exist_ok=True)
    if a_set.images_of:
        obtain(a_set.images_of, folder, token=token)
    part = folder / f".{name}.part"
    source = from_user(given, a_set) if given else from_public(name, a_set, part, token)
    try:
        compare_with_records(name, source, paths)
        if a_set.images_of:
            write_images(source, folder / f"{a_set.images_of}.csv", wanted[0])
        else:
            for path, converted in zip(paths, convert(name, a_set, source, splits), strict=True):
                check_splits([path for path in paths if path not in wanted], source.facts.get("splits"))
                if path in wanted:
                    write_list(path, converted, a_set, source)
    except UserError as error:
        if given:
            raise
        discard(part)
        raise UserError(f"the file received for {name} was not kept: {error}") from None
    discard(part)


def is_there(path: Path) -> bool:
    """Whether a list or folder exists. Raises UserError if it differs from its record, or has none."""
    record = path.with_suffix(".json")
    if not path.exists():
        return False
    if not record.exists():
        raise UserError(f"{path} exists without its record {record.name}; move it away to make it again")
    if (sha256_images(path) if path.is_dir() else sha256_file(path)) != recorded(record):
        raise UserError(f"{path} is not what {record.name} records; move both away to make it again")
    return True


def check_splits(paths: list[Path], splits: list[str] | None, default_too: bool = True) -> None:
    """Refuse other splits of CoPro than those that the lists at `paths` were made from; older records name none."""
    for path in paths:
        made_of = read_json(path.with_suffix(".json")).get("splits")
        asked = default_too or splits != list(COPRO_SPLITS[:1])
        if made_of != splits and asked and path.stem.startswith("copro_"):
            before = ", ".join(made_of or ["all splits"])
            raise UserError(f"{path} was made from {before}; move both lists and their records away to make them from others")


def from_user(path: Path, a_set: PromptSet) -> Source:
    """A file that the user supplied; another hash than the published one is only a warning."""
    if not path.is_file():
        raise not_found("the file to convert,", path)
    same = bool(a_set.sha256) and has_digest(path, a_set.sha256)
    if a_set.sha256 and not same:
        logger.warning("%s is not the published file; it is converted anyway", path)
    facts = {"source": path.name, "licence": a_set.licence, "source_sha256": sha256_file(path), "checksum_verified": same}
    return Source(path, path.suffix.lower(), facts, given=True)


def from_public(name: str, a_set: PromptSet, part: Path, token: str | None) -> Source:
    """Download a set's file to `part` and compare it with the published hash, if there is one. Raises UserError."""
    if not (a_set.url or a_set.hub):
        raise UserError(
            f"{name} has no public source: ask its authors at {a_set.page}, then --convert FILE {name}; "
            f"{name}_prompts is the paper's own copy"
        )
    url, digest, licence, headers = a_set.url, a_set.sha256, a_set.licence, {}
    try:
        if a_set.hub:  # the token is sent to the hub only
            found = hub_file(a_set.hub, choices.TABLE_SUFFIXES, token)
            url, digest, licence = found.url, found.digest, found.licence or licence
            headers = {"Authorization": f"Bearer {token}"} if token else {}
        download(name, url, part, headers)
    except Denied as error:
        if not a_set.hub:
            raise
        raise UserError(
            f"the hub gives {name} to accounts with access only: ask for it at {a_set.page}, "
            f"then pass that account's --token (or HF_TOKEN); {error}"
        ) from None
    if digest and not has_digest(part, digest):
        discard(part)
        raise UserError(f"the file received for {name} does not have the published checksum {digest}; it was not kept")
    facts = {"source": url, "licence": licence, "source_sha256": sha256_file(part), "checksum_verified": bool(digest)}
    if not digest:
        text = "no hash of %s is published; the sha256 of this download, %s, is recorded, and later ones must have the same"
        logger.info(text, name, facts["source_sha256"])
    return Source(part, PurePosixPath(urlsplit(url).path).suffix.lower(), facts, given=False)


def compare_with_records(name: str, source: Source, paths: list[Path]) -> None:
    """Raise UserError for a source other than the one that a record names, even if the list itself is missing."""
    for record in (path.with_suffix(".json") for path in paths):
        known = recorded(record, "source_sha256") if record.exists() else source.facts["source_sha256"]
        if known != source.facts["source_sha256"]:
            raise UserError(f"{name} was made from another file, as {record} says; move both away to make it from this one")


def convert(name: str, a_set: PromptSet, source: Source, splits: Sequence[str] = COPRO_SPLITS[:1]) -> tuple[Converted, ...]:
    """The lists of a set, one for each of its outputs. Raises UserError, also for another number of rows than was published."""
    if a_set.pairs:
        content = read_json(source.path, lines=source.suffix == ".jsonl")
        if splits_of(content):
            source.facts["splits"] = list(splits)
        return convert_pairs(content, a_set.pairs, source.path.name, splits)
    table = read_source(source.path, source.suffix)
    filled = convert_prompts(table, a_set, source.path.name)
    counts = (len(table), len(table) - filled.blank)  # a published number may or may not count blank ones
    if (a_set.rows and a_set.rows not in counts) or len(table) < (a_set.first or 0):
        wrong = f"{name} has {len(table)} rows here, and {a_set.rows or a_set.first} as published"
        if not source.given:
            raise UserError(wrong)
        logger.warning("%s", wrong)
    return (filled,)


def write_list(path: Path, converted: Converted, a_set: PromptSet, source: Source) -> None:
    """Write one list, after its record."""
    counts = {"rows": len(converted.rows), "left_out": converted.left_out, "blank": converted.blank}
    with replacing(path) as temporary:
        write_rows(converted.rows, temporary)
        facts = {"sha256": sha256_file(temporary), "columns": list(converted.rows.columns)}
        write_record(path, source, {**counts, "source_rows": converted.source_rows, "use": a_set.use, **facts})
    why = "name minors in a sexual set" if a_set.sexual else "put minors in a sexual context"
    left = f"{converted.left_out} of {converted.source_rows} never drawn, because they {why}"
    left = left if a_set.use == "generate" else "a training set, of which none is left out"
    print(f"{path}: {len(converted.rows)} rows, {left}, {converted.blank} blank")


def write_images(source: Source, csv_path: Path, folder: Path) -> None:
    """Write the images of a list into a folder, after its record."""
    with replacing(folder) as temporary:
        names = extract_images(source.path, csv_path, temporary)
        facts = {"rows": len(names), "use": "reference", "sha256": sha256_images(temporary), "list": csv_path.name}
        write_record(folder, source, facts | {"list_sha256": sha256_file(csv_path)})
    print(f"{folder}: {len(names)} images")


def write_record(path: Path, source: Source, facts: dict) -> None:
    date = datetime.date.today().isoformat()
    write_json(path.with_suffix(".json"), {"name": path.stem, "date": date, **source.facts, **facts})


def sha256_images(folder: Path) -> str:
    """One hash of a folder's files: their names and contents."""
    return sha256_texts(f"{path.name} {sha256_file(path)}" for path in visible(folder, "*"))


if __name__ == "__main__":
    cli.run(main)
