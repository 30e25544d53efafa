"""Prompt CSVs in, clean rows with stable numbers out."""

import re
import warnings
from pathlib import Path

from des.cli import UserError

import pandas as pd

# Prompts that put minors in a sexual context are never drawn. The lists err on the side of leaving a prompt out. `*+` gives no
# space back: with `*` the time would grow with the square of a run of spaces.
_MINOR = re.compile(
    r"\b(child(ren|ish|hood)?|kids?|minors?|teen(s|age|aged|ager|agers)?|pre-?teens?|under-?aged?|toddlers?|infants?|bab(y|ies)"
    r"|school-?(girl|boy|child|kid)s?|schoolchildren|girls?|boys?|adolescents?|juveniles?|youngsters?|lolis?|lolitas?|shotas?"
    r"|lolicon|shotacon|kindergart\w*|pupils?|jailbait|(1[0-7]|[1-9])\s*+-?\s*+(y\.?o\.?|years?\s*+-?\s*+old|yr\.?s?\s*+-?\s*+old))\b",
    re.IGNORECASE,
)
_SEXUAL = re.compile(
    r"\b(nud(e|es|ity|ist|ism)|naked\w*|nsfw|sex(y|ual\w*|ting)?|sexuali[sz]ed|erotic\w*|porn\w*|hentai|topless|bottomless|undress\w*"
    r"|lingerie|underwear|panties|breasts?|nipples?|genital\w*|penis\w*|vagina\w*|buttocks?|bikini|seductive\w*|sensual\w*|lewd\w*"
    r"|strip(ping|tease|per)|unclothed|explicit|orgasm\w*|masturbat\w*|fetish\w*|intimate|aroused|lust\w*|xxx)\b",
    re.IGNORECASE,
)
_SEXUAL_SET_SHARE = 0.05


def read_table(csv_path: Path, separator: str = ",") -> pd.DataFrame:
    """Read a CSV with a header as it stands: every column is text; UserError where it is missing, empty or unreadable."""
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


def never_drawn(prompts: list[str], sexual_set: bool = False) -> list[int]:
    """Return the rows that must not be generated: minors in a sexual context.

    In a sexual list, which is one that the caller knows as such (`sexual_set`) or of which at least 5% is sexual, every prompt
    that names a minor is one; elsewhere, only a prompt that names a minor and is sexual itself. No option turns this off.
    """
    sexual = [bool(_SEXUAL.search(prompt)) for prompt in prompts]
    sexual_set = sexual_set or (sum(sexual) >= _SEXUAL_SET_SHARE * len(prompts) and any(sexual))
    return [i for i, prompt in enumerate(prompts) if _MINOR.search(prompt) and (sexual_set or sexual[i])]
