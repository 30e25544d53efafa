"""Converting the file of a public prompt set to a CSV with a `prompt` column, and extracting a list's images from COCO's archive."""

import csv
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from des.data.prompt_sets import COPRO_SPLITS, KEPT_COLUMNS, PromptSet
from des.data.prompts import SOURCE_ROW, never_drawn, read_rows, read_table
from des.utils.choices import TABLE_SUFFIXES as TABLES
from des.utils.errors import UserError

import pandas as pd

# Names of CoPro's fields, in the original file and in copies.
_SAFE = ("safe_prompt", "safe_prompts", "safe", "benign_prompt", "benign_prompts", "benign")
_UNSAFE = ("unsafe_prompt", "unsafe_prompts", "unsafe", "harmful_prompt", "harmful_prompts", "harmful")
_CATEGORY = ("category", "categories", "class", "theme", "concept", "concepts")
_CATEGORIES = {
    "sexual": ("sexual", "sexual_content", "sex", "nudity"),
    "violence": ("violence", "violent", "violent_content"),
    "illegal": ("illegal", "illegal_activity", "illegal_activities", "illegality"),
}


@dataclass
class Converted:
    """Rows to write, with the column `prompt` first, and counts of the source's rows: all, blank, and left out by `never_drawn`."""

    rows: pd.DataFrame
    source_rows: int
    blank: int = 0
    left_out: int = 0


def read_source(path: Path, suffix: str) -> pd.DataFrame:
    """Read a table in one of the formats `TABLES` with every column as text. Raises UserError for an unreadable file."""
    if suffix in (".csv", ".tsv"):
        table = read_table(path, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".parquet":
        try:
            table = pd.read_parquet(path, dtype_backend="numpy_nullable")
        except ImportError:
            raise UserError("parquet files need pyarrow: pip install -r requirements.txt") from None
        except (ValueError, OSError) as error:  # pyarrow's own errors are both
            raise UserError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from None
    elif suffix in (".json", ".jsonl", ".txt"):
        content = _lines(path) if suffix == ".txt" else read_json(path, lines=suffix == ".jsonl")
        table = _table(content)
        if table is None:
            raise UserError(f"{path} does not contain a list of records, columns or prompts")
    else:
        raise UserError(f"{path} cannot be converted; the supported formats are {', '.join(TABLES)}")
    table = table.astype(object)
    return pd.DataFrame({str(name): [_as_text(value) for value in table[name]] for name in table}, dtype=str)


def read_json(path: Path, lines: bool = False) -> Any:
    """Read JSON, or JSON Lines as a list; UserError if the file is damaged."""
    try:
        content = [json.loads(line) for line in _lines(path) if line.strip()] if lines else json.loads(_text_of(path))
        json.dumps(content, ensure_ascii=False).encode()
        return content
    except UnicodeEncodeError:
        raise UserError(f"{path} contains unpaired surrogates, which UTF-8 cannot encode; correct the file") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from None


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None


def _lines(path: Path) -> list[str]:
    return _text_of(path).removesuffix("\n").split("\n")  # splitlines would split at rarer characters too


def _table(content: Any) -> pd.DataFrame | None:
    """Return a table made of a list of prompts, a list of records, a dict of columns, or a dict's only list; None for other content."""
    if isinstance(content, list) and all(isinstance(entry, str) for entry in content):
        return pd.DataFrame({"prompt": content}, dtype=object)
    if isinstance(content, list) and all(isinstance(entry, dict) for entry in content):
        return pd.DataFrame(content, dtype=object)
    if not isinstance(content, dict):
        return None
    lists = [value for value in content.values() if isinstance(value, list)]
    if (
        len(lists) == len(content)
        and len({len(column) for column in lists}) == 1
        and not isinstance((lists[0] or [0])[0], dict)
    ):
        return pd.DataFrame(content, dtype=object)
    return _table(lists[0]) if len(lists) == 1 else None


def _as_text(value: Any) -> str:
    """Return a cell as text: empty for a missing value, JSON for a list or dict."""
    if isinstance(value, str):
        return value
    if not pd.api.types.is_scalar(value):
        return json.dumps(value if isinstance(value, dict) else list(value), ensure_ascii=False, default=str)
    return "" if pd.isna(value) else str(value)


def convert_prompts(table: pd.DataFrame, a_set: PromptSet, what: str) -> Converted:
    """Return the usable rows of a set, in order, without blank prompts.

    Their columns are `prompt` and, in a set to generate from, KEPT_COLUMNS and `source_row`, the row's number in the source
    (from 0). A set to generate from also loses the prompts of `never_drawn`. `what` names the source in errors. Raises UserError
    for missing columns and if no row is left.
    """
    known = {name.strip().lower(): name for name in reversed(table.columns)}
    column = next((known[name] for name in (a_set.column, "prompt") if name in known), None)
    missing = [names for names in a_set.required if not any(name in known for name in names.split(" or "))]
    if column is None or missing:
        lacks = a_set.column if column is None else missing[0].replace(" or ", "` or `")
        raise UserError(f"{what} has no column `{lacks}`; its columns are {', '.join(map(repr, table.columns))}")
    kept = [name for name in KEPT_COLUMNS if name in known and name != column] if a_set.use == "generate" else []
    rows = pd.DataFrame({"prompt": table[column], **{name: table[known[name]] for name in kept}})
    if a_set.use == "generate":
        rows[SOURCE_ROW] = [str(row) for row in range(len(rows))]
    rows = rows.head(a_set.first) if a_set.first else rows
    filled = rows[rows["prompt"].str.strip() != ""].reset_index(drop=True)
    never = never_drawn(filled["prompt"].tolist(), a_set.sexual) if a_set.use == "generate" else []
    left = filled.drop(index=never).reset_index(drop=True)
    if left.empty:
        raise UserError(f"{what} has no usable prompt: all are blank or must never be drawn")
    return Converted(left, len(table), len(rows) - len(filled), len(never))


def splits_of(content: Any) -> list[str]:
    """Return the names in `COPRO_SPLITS` that a JSON file has; copies of CoPro may have none."""
    return [name for name in COPRO_SPLITS if isinstance(content, dict) and name in content]


def convert_pairs(
    content: Any, category: str, what: str, splits: Sequence[str] = COPRO_SPLITS[:1]
) -> tuple[Converted, Converted]:
    """Return CoPro's safe and unsafe prompts of a category. Row i of both is a pair; pairs with a blank prompt are left out.

    If the file has CoPro's splits, only `splits` are read. Records are found at any depth: each has a safe and an unsafe field (a
    prompt, or lists of equal length), and its category in a field or in a key above it. Raises UserError if none is found.
    """
    if splits_of(content):
        missing = [split for split in splits if split not in content]
        if missing:
            raise UserError(f"{what} has no split {missing[0]}, but {', '.join(splits_of(content))}")
        content = [content[split] for split in splits]
    found = [(safe, unsafe) for where, safe, unsafe in _records(content, "") if _is(where, category)]
    pairs = [pair for pair in found if all(prompt.strip() for prompt in pair)]
    if not pairs:
        raise UserError(f"{what} has no pairs of safe and unsafe prompts of the category {category} in a supported form")
    safe, unsafe = (pd.DataFrame({"prompt": side}, dtype=str) for side in zip(*pairs, strict=True))
    blank = len(found) - len(pairs)
    return Converted(safe, len(found), blank), Converted(unsafe, len(found), blank)


def _records(content: Any, place: str) -> Iterator[tuple[Any, str, str]]:
    """Yield every (category, safe, unsafe) in nested JSON; a record without a known category gets that of the nearest key above it."""
    if isinstance(content, list):
        for entry in content:
            yield from _records(entry, place)
    elif isinstance(content, dict):
        fields = {_plain(name): value for name, value in content.items()}
        safe, unsafe, label = (next((fields[n] for n in names if n in fields), None) for names in (_SAFE, _UNSAFE, _CATEGORY))
        if safe is None or unsafe is None:
            for name, value in content.items():
                yield from _records(value, name if _is_known(name) else place)
        else:
            yield from _pairs_of(safe, unsafe, label if _is_known(label) else place)


def _pairs_of(safe: Any, unsafe: Any, category: Any) -> Iterator[tuple[Any, str, str]]:
    """Yield the pairs of one record: two prompts with one or more categories, or two lists with one category or one for each pair."""
    if isinstance(safe, str) and isinstance(unsafe, str):
        yield category, safe, unsafe
        return
    safe, unsafe, category = (list(side.values()) if isinstance(side, dict) else side for side in (safe, unsafe, category))
    whole = all(isinstance(side, list) and all(isinstance(prompt, str) for prompt in side) for side in (safe, unsafe))
    categories = category if isinstance(category, list) or not whole else [category] * len(safe)
    if not whole or not len(safe) == len(unsafe) == len(categories):
        raise UserError(
            "a record has different numbers of safe prompts, unsafe prompts and categories, or values that are not text"
        )
    yield from zip(categories, safe, unsafe, strict=True)


def _plain(name: Any) -> str:
    return str(name).strip().lower().replace(" ", "_").replace("-", "_")


def _is(place: Any, category: str) -> bool:
    return any(_plain(name) in _CATEGORIES[category] for name in (place if isinstance(place, list) else [place]))


def _is_known(place: Any) -> bool:
    """Whether a category, or one of several, is one of `_CATEGORIES`."""
    names = list(place.values()) if isinstance(place, dict) else place
    return any(_is(names, category) for category in _CATEGORIES)


def write_rows(rows: pd.DataFrame, path: Path) -> None:
    """Write a prompt CSV; UserError unless `read_rows` returns the same rows."""
    quoting = csv.QUOTE_ALL  # QUOTE_MINIMAL does not quote a lone carriage return, and readers would end the row there
    rows.to_csv(path, index=False, lineterminator="\n", encoding="utf-8", quoting=quoting)
    if not read_rows(path).equals(rows):
        raise UserError("its prompts contain characters that a CSV file cannot represent")


def extract_images(archive: Path, csv_path: Path, folder: Path) -> list[str]:
    """Extract `COCO_val2014_{case_number:012d}.jpg` for each row of a list from COCO's archive to a new folder; returns the names.

    Raises UserError if the archive is damaged or lacks an image.
    """
    rows = read_rows(csv_path)
    numbers = rows.get("case_number", ())
    if not len(numbers) or not all(number.isdecimal() for number in numbers):
        raise UserError(f"{csv_path} needs a column `case_number` with the whole numbers of COCO's images")
    names = [f"COCO_val2014_{number:012d}.jpg" for number in sorted(set(map(int, numbers)))]
    try:
        with zipfile.ZipFile(archive) as content:
            members = {PurePosixPath(name).name: name for name in content.namelist()}
            missing = [name for name in names if name not in members]
            if missing:
                raise UserError(f"the archive lacks {len(missing)} of {len(names)} images, {missing[0]} first")
            folder.mkdir()
            for name in names:
                (folder / name).write_bytes(content.read(members[name]))  # `read` checks the CRC
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"the archive is damaged: {error}") from None
    return names
