"""From the file of a public prompt set to the rows of one `prompt` column, and from COCO's archive to the images of a list."""

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

# What CoPro's fields may be called in its own file and in copies of it.
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
    """Rows to write, `prompt` first; how many rows their source had, and how many of these were blank or must not be drawn."""

    rows: pd.DataFrame
    source_rows: int
    blank: int = 0
    left_out: int = 0


def read_source(path: Path, suffix: str) -> pd.DataFrame:
    """Read a table of any of the formats `TABLES`; every column is text. Raises UserError for what cannot be read."""
    if suffix in (".csv", ".tsv"):
        table = read_table(path, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".parquet":
        try:
            table = pd.read_parquet(path, dtype_backend="numpy_nullable")
        except ImportError:
            raise UserError("parquet files need pyarrow: pip install -r requirements.txt") from None
        except (ValueError, OSError) as error:  # pyarrow's own errors are both
            raise UserError(f"{path} is no readable parquet file: {str(error).splitlines()[0]}") from None
    elif suffix in (".json", ".jsonl", ".txt"):
        content = _lines(path) if suffix == ".txt" else read_json(path, lines=suffix == ".jsonl")
        table = _table(content)
        if table is None:
            raise UserError(f"{path} holds no list of records, of columns or of prompts")
    else:
        raise UserError(f"{path} is of no format that can be converted: {', '.join(TABLES)}")
    table = table.astype(object)
    return pd.DataFrame({str(name): [_as_text(value) for value in table[name]] for name in table}, dtype=str)


def read_json(path: Path, lines: bool = False) -> Any:
    """Read JSON, or JSON Lines as a list; UserError where it is damaged."""
    try:
        content = [json.loads(line) for line in _lines(path) if line.strip()] if lines else json.loads(_text_of(path))
        json.dumps(content, ensure_ascii=False).encode()
        return content
    except UnicodeEncodeError:
        raise UserError(f"{path} holds halves of characters (surrogates), which no text in UTF-8 can") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is no readable JSON: {error}") from None


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8: {error}") from None


def _lines(path: Path) -> list[str]:
    return _text_of(path).removesuffix("\n").split("\n")  # splitlines would split at rarer characters too


def _table(content: Any) -> pd.DataFrame | None:
    """A table from a list of prompts or records, from named columns, or from the one member that holds such."""
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
    """A cell as text; a missing one is empty, and a list is JSON."""
    if isinstance(value, str):
        return value
    if not pd.api.types.is_scalar(value):
        return json.dumps(value if isinstance(value, dict) else list(value), ensure_ascii=False, default=str)
    return "" if pd.isna(value) else str(value)


def convert_prompts(table: pd.DataFrame, a_set: PromptSet, what: str) -> Converted:
    """The rows of a set that may be used, in their order: `prompt`, the columns that the set keeps, and of a set to generate from
    `source_row`, the row's number in the source (from 0), so that a list keeps it whatever is left out.

    Blank prompts are left out; so are, of a set to generate from, those of `never_drawn`. `what` names the source in errors.
    Raises UserError for missing columns, or no row.
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
        raise UserError(f"{what} has no prompt that may be used")
    return Converted(left, len(table), len(rows) - len(filled), len(never))


def splits_of(content: Any) -> list[str]:
    """The splits of CoPro (`COPRO_SPLITS`) that a JSON file has; none for a copy without them."""
    return [name for name in COPRO_SPLITS if isinstance(content, dict) and name in content]


def convert_pairs(
    content: Any, category: str, what: str, splits: Sequence[str] = COPRO_SPLITS[:1]
) -> tuple[Converted, Converted]:
    """CoPro's safe and unsafe prompts of a category; row i of both is a pair, and every whole pair is kept.

    Only `splits` are read of a file that has CoPro's splits. Records are found at any depth: each has a safe and an unsafe field
    (a prompt, or lists of equal length), and its category in a field or in a key above it. Raises UserError where none is found.
    """
    if splits_of(content):
        missing = [split for split in splits if split not in content]
        if missing:
            raise UserError(f"{what} has no split {missing[0]}, but {', '.join(splits_of(content))}")
        content = [content[split] for split in splits]
    found = [(safe, unsafe) for where, safe, unsafe in _records(content, "") if _is(where, category)]
    pairs = [pair for pair in found if all(prompt.strip() for prompt in pair)]
    if not pairs:
        raise UserError(f"{what} holds no pairs of safe and unsafe prompts of the category {category} in a form known here")
    safe, unsafe = (pd.DataFrame({"prompt": side}, dtype=str) for side in zip(*pairs, strict=True))
    blank = len(found) - len(pairs)
    return Converted(safe, len(found), blank), Converted(unsafe, len(found), blank)


def _records(content: Any, place: str) -> Iterator[tuple[Any, str, str]]:
    """Every (category, safe, unsafe) in nested JSON; a record without a known category has that of the nearest name above it."""
    if isinstance(content, list):
        for entry in content:
            yield from _records(entry, place)
    elif isinstance(content, dict):
        fields = {_plain(name): value for name, value in content.items()}
        safe, unsafe, own = (next((fields[n] for n in names if n in fields), None) for names in (_SAFE, _UNSAFE, _CATEGORY))
        if safe is None or unsafe is None:
            for name, value in content.items():
                yield from _records(value, name if _is_known(name) else place)
        else:
            yield from _pairs_of(safe, unsafe, own if _is_known(own) else place)


def _pairs_of(safe: Any, unsafe: Any, category: Any) -> Iterator[tuple[Any, str, str]]:
    """The pairs of one record: two prompts of one or more categories, or as many of both sides, of one category or one each."""
    if isinstance(safe, str) and isinstance(unsafe, str):
        yield category, safe, unsafe
        return
    safe, unsafe, category = (list(side.values()) if isinstance(side, dict) else side for side in (safe, unsafe, category))
    whole = all(isinstance(side, list) and all(isinstance(prompt, str) for prompt in side) for side in (safe, unsafe))
    categories = category if isinstance(category, list) or not whole else [category] * len(safe)
    if not whole or not len(safe) == len(unsafe) == len(categories):
        raise UserError("a record has safe and unsafe prompts or categories that are not as many, or no texts")
    yield from zip(categories, safe, unsafe, strict=True)


def _plain(name: Any) -> str:
    return str(name).strip().lower().replace(" ", "_").replace("-", "_")


def _is(place: Any, category: str) -> bool:
    return any(_plain(name) in _CATEGORIES[category] for name in (place if isinstance(place, list) else [place]))


def _is_known(place: Any) -> bool:
    """Whether a category, or one of several, is one of those that are asked for."""
    names = list(place.values()) if isinstance(place, dict) else place
    return any(_is(names, category) for category in _CATEGORIES)


def write_rows(rows: pd.DataFrame, path: Path) -> None:
    """Write a prompt CSV; UserError unless the project's reader gives the same rows back."""
    quoting = csv.QUOTE_ALL  # QUOTE_MINIMAL leaves a lone carriage return bare, which readers take for the end of a row
    rows.to_csv(path, index=False, lineterminator="\n", encoding="utf-8", quoting=quoting)
    if not read_rows(path).equals(rows):
        raise UserError("its prompts hold characters that a CSV file does not keep")


def extract_images(archive: Path, csv_path: Path, folder: Path) -> list[str]:
    """Write `COCO_val2014_{case_number:012d}.jpg` of each row of a list from COCO's archive to a new folder; returns their names.

    Raises UserError for an archive that is damaged or lacks one of them.
    """
    rows = read_rows(csv_path)
    numbers = rows.get("case_number", ())
    if not len(numbers) or not all(number.isdecimal() for number in numbers):
        raise UserError(f"{csv_path} needs a column `case_number` of whole numbers, those of COCO's images")
    names = [f"COCO_val2014_{number:012d}.jpg" for number in sorted(set(map(int, numbers)))]
    try:
        with zipfile.ZipFile(archive) as content:
            members = {PurePosixPath(name).name: name for name in content.namelist()}
            missing = [name for name in names if name not in members]
            if missing:
                raise UserError(f"the archive lacks {len(missing)} of {len(names)} images, {missing[0]} first")
            folder.mkdir()
            for name in names:
                (folder / name).write_bytes(content.read(members[name]))  # which checks its CRC
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"the archive is damaged: {error}") from None
    return names
