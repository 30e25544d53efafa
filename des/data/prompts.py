"""Prompt CSVs in, clean rows with stable numbers out."""

import csv
import warnings
from pathlib import Path

from des.data.never_drawn import never_drawn
from des.utils.errors import UserError
from des.utils.logs import logger

import pandas as pd

SOURCE_ROW = "source_row"  # the column with a row's number in the published list, of which a converted one may lack rows
_LONGEST_CELL = 2**31 - 1  # characters; the default of the module csv is 131,072
__all__ = ["SOURCE_ROW", "never_drawn", "read_prompts", "read_rows", "read_table"]


def read_table(csv_path: Path, separator: str = ",") -> pd.DataFrame:
    """Read a CSV with a header as it stands: every column is text; UserError where it is missing, empty or unreadable."""
    _check_quotes(csv_path, separator)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # raised where a row has more cells than the header
            return pd.read_csv(csv_path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False, sep=separator)
    except (pd.errors.ParserWarning, pd.errors.ParserError):
        raise UserError(
            f"{csv_path} has a row with more cells than its header, or an open quote; quote prompts with commas"
        ) from None
    except FileNotFoundError:
        raise UserError(f"there is no prompt file {csv_path}; datasets/download.py fetches the public ones") from None
    except (pd.errors.EmptyDataError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{csv_path} is no readable CSV file in UTF-8: {str(error).strip().splitlines()[0]}") from None


def _check_quotes(csv_path: Path, separator: str) -> None:
    """Raise UserError, which names the line, for a stray quotation mark; pandas would merge rows up to the next one.

    Logs how many rows have line breaks inside a cell, which are rows that lost their closing mark or are meant so.
    """
    if not csv_path.is_file():
        return  # pandas says what is wrong
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
    """Read a prompt CSV; row i of the result is row i as every script of this project counts them.

    Every column is text, as it stands in the file: "nan" and "NA" are prompts, equal prompts are rows of their own, and a cell
    may hold commas, quotes and line breaks, and be of any length. A byte order mark and CRLF are read. Rows whose `prompt` is
    blank are left out and do not count. Raises UserError for a file that is missing, empty, unreadable, not UTF-8, without a
    `prompt` column or with two, or with a NUL. No error quotes a cell: prompts do not belong in logs, nor a header that is one.
    """
    rows = read_table(csv_path)
    if any("\0" in title for title in rows):
        raise UserError(f"{csv_path} has NULs in its header; save it as UTF-8, which it seems not to be")
    if "prompt" not in rows:
        raise UserError(f"{csv_path} has no column `prompt`, but {len(rows.columns)} of other names; name it in the first line")
    if "prompt.1" in rows:  # pandas' name for a second one
        raise UserError(f"{csv_path} has two columns `prompt`; rename the one that is not meant")
    rows = rows[rows["prompt"].str.strip() != ""].reset_index(drop=True)
    if rows.empty:
        raise UserError(f"{csv_path} has no prompt in its column `prompt`")
    damaged = rows.index[rows.apply(lambda column: column.str.contains("\0", regex=False)).any(axis=1)]
    if len(damaged):
        raise UserError(f"{csv_path} has a NUL in row {damaged[0]} (counted from 0), which no prompt has; mend the file")
    return rows


def read_prompts(csv_path: Path, sampling_ratio: float = 1.0) -> list[str]:
    """Read the prompts of a CSV, or a fixed random share of them (`random_state=42`, as published)."""
    prompts = read_rows(csv_path)["prompt"]
    if sampling_ratio < 1.0:
        prompts = prompts.sample(frac=sampling_ratio, random_state=42)
        if prompts.empty:
            raise UserError(f"--sampling_ratio {sampling_ratio} leaves no prompt of {csv_path}")
    return prompts.tolist()
