"""Reading prompt CSVs with stable row numbers and clear errors."""

import csv
import re
import warnings
from pathlib import Path

from des.data.never_drawn import PLACEHOLDER, never_drawn
from des.utils.errors import UserError, not_found
from des.utils.logs import logger

import pandas as pd

SOURCE_ROW = "source_row"  # a row's number in the published list; a converted list may lack some rows
_TEXT_COLUMNS = ("text", "caption", "captions", "prompts", "sentence", "description", "adv_prompt", "sensitive prompt")
_CONVERT = "`python datasets/download.py --convert FILE NAME` reads that format"
_LONGEST_CELL = 2**31 - 1  # characters; csv's default is 131,072


def read_table(csv_path: Path, separator: str = ",") -> pd.DataFrame:
    """Read a CSV with a header; every column is unchanged text. Raises UserError for a missing, empty or unreadable file."""
    _check_format(csv_path, separator)
    _check_quotes(csv_path, separator)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # for a row with more cells than the header
            return pd.read_csv(csv_path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False, sep=separator)
    except (pd.errors.ParserWarning, pd.errors.ParserError):
        raise UserError(
            f"{csv_path} is not a CSV file, or has a row with more cells than its header; put prompts with commas into quotes"
        ) from None
    except (FileNotFoundError, IsADirectoryError):
        raise not_found("the prompt file", csv_path, "datasets/download.py downloads public ones") from None
    except UnicodeDecodeError:
        raise UserError(f"{csv_path} is not a readable CSV file in UTF-8; save it as UTF-8 (`CSV UTF-8` in Excel)") from None
    except pd.errors.EmptyDataError as error:
        raise UserError(f"{csv_path} is not a readable CSV file in UTF-8: {str(error).strip().splitlines()[0]}") from None


def _check_format(path: Path, separator: str) -> None:
    """Raise UserError for a file of another format that is named .csv, or with separators other than commas."""
    if separator != "," or not path.is_file():
        return
    with path.open("rb") as file:
        start = file.readline(2**16)
    if start.startswith(b"PAR1"):
        raise UserError(f"{path} is a parquet file, not CSV; {_CONVERT}")
    first = start.decode("utf-8-sig", errors="replace").strip()
    if re.match(r'\{\s*"|\[\s*[{"]|[{\[]$', first):
        raise UserError(f"{path} is JSON, not CSV; {_CONVERT}")
    if re.fullmatch(r"\"?sep=.\"?,*", first):
        raise UserError(f"{path} begins with Excel's line `sep=`; delete that line, and separate the columns by commas")
    for other, name in ((";", "semicolons"), ("\t", "tabs")):
        if "prompt" in _titles(first, other) and "prompt" not in _titles(first, ","):
            raise UserError(f"{path} has its columns separated by {name}; save it as CSV with commas")


def _titles(line: str, separator: str) -> list[str]:
    return [title.strip().strip('"').strip().lower() for title in line.split(separator)]


def _check_column(csv_path: Path, titles: list[str]) -> None:
    """Raise UserError unless there is exactly one column `prompt`. Only one-word column names are quoted: others may be prompts."""
    same = [title for title in titles if title == "prompt" or title == "prompt.1"]  # pandas' name for a second one
    if len(same) == 1:
        return
    if same:
        raise UserError(f"{csv_path} has two columns named `prompt`; rename one of them")
    fit = next((title for title in titles if title.strip().lower() in _TEXT_COLUMNS), None)
    advice = f"rename the column `{fit}` to `prompt`" if fit else "name the column of prompts `prompt` in the first line"
    names = [f"`{title}`" for title in titles if len(titles) > 1 and re.fullmatch(r"\w{1,30}", title)][:10]
    unnamed = len(titles) - len(names)
    others = f"{unnamed} other column{'s' * (unnamed > 1)}" if unnamed else ""
    raise UserError(
        f"{csv_path} has no column `prompt`, only {' and '.join(filter(None, (', '.join(names), others)))}; {advice}"
    )


def _check_quotes(csv_path: Path, separator: str) -> None:
    """Raise UserError with the line number for a stray quotation mark; pandas would merge all rows up to the next one.

    Logs how many rows have line breaks inside a cell, since a closing quotation mark may be missing there.
    """
    if not csv_path.is_file():
        return  # `pd.read_csv` raises the error
    line, rows, broken = 1, 0, 0
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        with csv_path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter=separator, strict=True)
            for cells in lines:
                if rows or any(cells):
                    rows += bool(cells)
                    broken += any("\n" in cell or "\r" in cell for cell in cells)
                line = lines.line_num + 1
    except csv.Error as error:
        if "new-line character seen" not in str(error):  # a lone carriage return ends a row for pandas
            raise UserError(
                f"{csv_path} has an open quote, or text after a closing one, in the row that begins at line "
                f"{line}; write each quotation mark inside a quoted cell twice"
            ) from None
    except UnicodeDecodeError:
        return
    finally:
        csv.field_size_limit(limit)
    if broken:
        logger.info("%s: %d rows, %d with line breaks inside a cell", csv_path, max(rows - 1, 0), broken)


def read_rows(csv_path: Path) -> pd.DataFrame:
    """Read a prompt CSV; the index of the result is the row number that all scripts use.

    The name of the column `prompt` may have any case and surrounding spaces. Every column is unchanged text: "nan" and "NA" are
    prompts, duplicates are kept, and a cell may contain commas, quotes and line breaks and have any length. A byte order mark and
    CRLF are accepted. Rows with a blank prompt are dropped and not numbered. Raises UserError for a file that is missing, empty,
    unreadable, not UTF-8, has no `prompt` column or two, or contains a NUL. No error quotes a cell, to keep prompts out of logs.
    """
    rows = read_table(csv_path)
    if any("\0" in title for title in rows):
        raise UserError(f"{csv_path} has NULs in its header, so it is probably not UTF-8; save it as UTF-8")
    if "prompt" not in rows:
        rows = rows.rename(columns={title: "prompt" for title in rows if title.strip().lower() == "prompt"})
    _check_column(csv_path, list(rows.columns))
    rows = rows[rows["prompt"].str.strip() != ""].reset_index(drop=True)
    if rows.empty:
        raise UserError(f"{csv_path} has no prompts: its column `prompt` is blank")
    damaged = rows.index[rows.apply(lambda column: column.str.contains("\0", regex=False)).any(axis=1)]
    if len(damaged):
        raise UserError(f"{csv_path} has a NUL character in row {damaged[0]} (counted from 0); correct the file")
    return rows


def read_prompts(csv_path: Path, sampling_ratio: float = 1.0) -> list[str]:
    """Read the prompts of a CSV, or a random share of them, always the same (`random_state=42`, as in the published code)."""
    prompts = read_rows(csv_path)["prompt"]
    if sampling_ratio < 1.0:
        prompts = prompts.sample(frac=sampling_ratio, random_state=42)
        if prompts.empty:
            raise UserError(f"--sampling_ratio {sampling_ratio} selects no prompt of {csv_path}; choose a larger ratio")
    return prompts.tolist()


def rows_to_draw(prompts: list[str], start: int = 0, end: int | None = None, negative_prompt: str | None = None) -> list[int]:
    """Return the row numbers from `start` to `end` (default: all), without prompts that are never drawn; UserError if none is left."""
    end = len(prompts) if end is None else end
    if end > len(prompts):
        logger.info("--end_idx %d is beyond the list; using the rows up to its end, row %d", end, len(prompts) - 1)
    if start >= len(prompts):
        raise UserError(f"--start_idx {start} is beyond the list of {len(prompts)} prompts")
    dropped = set(never_drawn(prompts, negative_prompt=negative_prompt))
    rows = range(start, min(end, len(prompts)))
    kept = [row for row in rows if row not in dropped]
    if len(kept) < len(rows):
        left_out = len(rows) - len(kept)
        logger.info(
            "%d of %d prompts are left out: they put minors in a sexual context, and are never drawn", left_out, len(rows)
        )
    if not kept:
        raise UserError("no prompt is left to draw: every one of these rows is left out")
    return kept


def check_placeholders(prompts: list[str], known: list[str]) -> None:
    """Raise UserError if prompts name learned tokens that are not `known`, which would be read as letters, or none of those known."""
    named = {token for prompt in prompts for token in PLACEHOLDER.findall(prompt)}
    if unknown := sorted(named - set(known)):
        raise UserError(f"these prompts contain the learned token {unknown[0]}; pass its file with --learned_tokens")
    if known and not named:
        raise UserError(f"no prompt contains a token of --learned_tokens, such as {known[0]}; leave the option out")
