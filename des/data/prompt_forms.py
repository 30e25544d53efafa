"""The normal forms of a prompt in which the safety filter looks up words, and the word patterns of never_drawn.toml."""

import re
import tomllib
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from confusable_homoglyphs import confusables

TABLE = tomllib.loads(Path(__file__).with_name("never_drawn.toml").read_text(encoding="utf-8"))
_INVISIBLE = re.compile("[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff]")  # fmt: skip
# Accents and the vowel signs of Arabic; those of Devanagari belong to their words.
_MARKS = re.compile("[\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u0640\u064b-\u065f\u0670\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]")  # fmt: skip
TOKEN = re.compile("(?:[^\\W\\d_]|[\u0900-\u0903\u093a-\u094f\u0951-\u0957\u0962\u0963])+|\\d+")
BREAK = "ˑˑ"  # a token that no term contains, so that phrases end at it
_CAMEL = re.compile("(?<=[a-zа-яё])(?=[A-ZА-ЯЁ])|(?<=[A-Z])(?=[A-Z][a-z])")
_NAMED_LETTER = re.compile(r"(?:LATIN .*LETTER|REGIONAL INDICATOR SYMBOL LETTER) (?:SMALL CAPITAL )?([A-Z])(?: |$)")
_LEET = {"0": "o", "1": "i", "2": "z", "3": "e", "4": "a", "5": "s", "6": "b", "7": "t", "8": "b", "9": "g", "@": "a", "$": "s", "!": "i", "|": "l", "+": "t", "€": "e"}  # fmt: skip
LEETS = tuple(str.maketrans(_LEET | changed) for changed in ({}, {"1": "l", "!": "l", "6": "g"}))
_LEET_CHUNK = re.compile(r"[^\s_]+")
_LEET_SIGN = re.compile(r"[0-9@$!|+€]")
_EMOJI = str.maketrans({sign: f" {word} " for sign, word in TABLE["emoji"].items()})
_TRIPLED = re.compile(r"(.)\1\1+")


def plain(text: str) -> str:
    """Normalise a text to NFKC without invisible characters and accents, keeping script and case; some emoji become words."""
    if text.isascii():
        return text
    text = text.translate(_EMOJI)
    text = unicodedata.normalize("NFKD", _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)))
    return unicodedata.normalize("NFC", _MARKS.sub("", text))


class _LatinLetters(dict):
    """A table for `str.translate` from each character to the Latin letter that it resembles (Unicode confusables), or itself."""

    def __missing__(self, code: int) -> str:
        self[code] = found = chr(code) if code < 128 else _latin(chr(code))
        return found


def _latin(character: str) -> str:
    among = confusables.is_confusable(character, greedy=True) or []
    letters = [each["c"] for one in among for each in one["homoglyphs"] if re.fullmatch("[A-Za-z]", each["c"])]
    same_case = [letter for letter in letters if letter.islower() == character.islower()]
    named = _NAMED_LETTER.match(unicodedata.name(character, ""))
    return (same_case or letters or ([named[1].lower()] if named else []) or [character])[0]


_LATIN = _LatinLetters()


def forms(prompt: str) -> Iterator[tuple[str, bool]]:
    """Yield each text whose tokens are to be looked up, and whether its single letters may spell out a word."""
    normal = plain(prompt)
    latin = normal if normal.isascii() else normal.translate(_LATIN)
    for text in dict.fromkeys((normal, latin)):
        lower = _numbers(text.casefold())
        yield lower, True
        split = _CAMEL.sub(" ", text)
        if split != text:
            yield _numbers(split.casefold()), False
        for changed in dict.fromkeys(_from_leet(lower)):
            if changed != lower:
                yield changed, False
        joined = list(_joined(lower))
        if joined:
            yield "\n".join(joined), False


def _numbers(text: str) -> str:
    """Remove thousands separators and decimals, and write ranges and "less than" in words."""
    if "<" in text:
        text = re.sub(r"<=?\s?(?=\d)", " under ", text)
    text = re.sub(r"(?<=\d),(?=\d\d\d(?!\d))", "", text)
    text = re.sub(r"(?<=\d)\.\d+", "", text)
    return re.sub(r"(?<=\d)\s?[-‐‑–—~/]\s?(?=\d)", " to ", text)


def _from_leet(text: str) -> Iterator[str]:
    """Yield the text with digits and signs inside words replaced by the letters that they stand for."""

    def letters(match: re.Match, table: dict) -> str:
        chunk = match[0].strip("!|+.,;:?\"'()[]{}")
        if chunk.isalpha() or not any(map(str.isalpha, chunk)):
            return match[0]
        return chunk.translate(table)

    if text.isalpha() or not _LEET_SIGN.search(text):
        return
    for table in LEETS:
        yield _LEET_CHUNK.sub(lambda match, table=table: letters(match, table), text)


def _joined(text: str) -> Iterator[str]:
    """Yield words that signs split into pieces, joined again, and words without their repeated letters; they form no phrases."""
    for chunk in text.split():
        if chunk.isalpha() and not _TRIPLED.search(chunk):
            continue
        parts = [part for part in TOKEN.findall(chunk) if not part.isdecimal()]
        whole = "".join(parts)
        shorter = _TRIPLED.sub(r"\1", whole)
        yield from (whole, BREAK) if len(parts) > 1 else ()
        yield from (shorter, BREAK) if shorter != whole else ()


def pattern_of(term: str) -> list[str]:
    """Return the tokens of a term of the tables; the last one may end in * for a prefix."""
    tokens = TOKEN.findall(plain(term).casefold())
    return [*tokens[:-1], tokens[-1] + "*" * term.endswith("*")]


def is_term(token: str, pattern: str) -> bool:
    """Whether a token is a term, or begins like one that ends in *."""
    return token.startswith(pattern[:-1]) if pattern.endswith("*") else token == pattern


def matches(words: list[str], start: int, pattern: list[str]) -> bool:
    return start + len(pattern) <= len(words) and all(is_term(words[start + i], each) for i, each in enumerate(pattern))
