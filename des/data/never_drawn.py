"""The safety filter: prompts that put minors in a sexual context are never drawn (docs/never_drawn.md).

A prompt is read in several normal forms, each a list of tokens, and the words of never_drawn.toml are looked up in all of them.
Every step takes time linear in the prompt's length.
"""

import re
import tomllib
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path

from des.utils.logs import logger

from confusable_homoglyphs import confusables

SEXUAL_SET_SHARE = 0.05
_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_INVISIBLE = re.compile("[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff]")  # fmt: skip
# Accents and the vowel signs of Arabic; those of Devanagari belong to their words.
_MARKS = re.compile("[\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u0640\u064b-\u065f\u0670\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]")  # fmt: skip
_TOKEN = re.compile("(?:[^\\W\\d_]|[\u0900-\u0903\u093a-\u094f\u0951-\u0957\u0962\u0963])+|\\d+")
_CAMEL = re.compile("(?<=[a-zа-яё])(?=[A-ZА-ЯЁ])|(?<=[A-Z])(?=[A-Z][a-z])")
_NAMED_LETTER = re.compile(r"(?:LATIN .*LETTER|REGIONAL INDICATOR SYMBOL LETTER) (?:SMALL CAPITAL )?([A-Z])(?: |$)")
_LEET = {"0": "o", "1": "i", "2": "z", "3": "e", "4": "a", "5": "s", "6": "b", "7": "t", "8": "b", "9": "g", "@": "a", "$": "s", "!": "i", "|": "l", "+": "t", "€": "e"}  # fmt: skip
_LEETS = tuple(str.maketrans(_LEET | changed) for changed in ({}, {"1": "l", "!": "l", "6": "g"}))
_LEET_CHUNK = re.compile(r"[^\s_]+")
_LEET_SIGN = re.compile(r"[0-9@$!|+€]")
_TRIPLED = re.compile(r"(.)\1\1+")
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")
_ARABIC_PREFIXES = ("وال", "بال", "كال", "فال", "لل", "ال", "و", "ب", "ل", "ف", "ك")
_LONGEST_TOKEN = 64  # characters; no word of the tables is as long


def never_drawn(prompts: Sequence[str], sexual_set: bool = False) -> list[int]:
    """Return the rows that must not be generated: minors in a sexual context.

    In a sexual list, which is one that the caller knows as such (`sexual_set`) or of which at least 5% is sexual, every prompt
    that names a minor is one, and the log says so; elsewhere, only a prompt that names a minor and is sexual itself. No option
    turns this off.
    """
    kinds = [kinds_of(prompt) for prompt in prompts]
    sexual = sum("sexual" in each for each in kinds)
    found = [i for i, each in enumerate(kinds) if {"minor", "sexual"} <= each]
    if sexual_set or (sexual and sexual >= SEXUAL_SET_SHARE * len(prompts)):
        every = [i for i, each in enumerate(kinds) if "minor" in each]
        if len(every) > len(found):
            _log_once(sexual, len(prompts), len(every), sexual_set)
        found = every
    return found


@cache
def _log_once(sexual: int, count: int, dropped: int, known: bool) -> None:
    """Log the rule for sexual lists; a run asks for the same list several times."""
    why = "known as a sexual set" if known else f"at least {SEXUAL_SET_SHARE:.0%} of it"
    logger.info("%d of %d prompts are sexual (%s), so all %d that name a minor are never drawn", sexual, count, why, dropped)


def kinds_of(prompt: str) -> frozenset[str]:
    """What a prompt names: "minor", "sexual", both or neither; words for relatives count where it is sexual itself."""
    found: set[str] = set()
    for words, spelled_out in _forms(prompt):
        found |= _kinds_of_words(words, spelled_out)
    found |= _kinds_of_cjk(_plain(prompt))
    for language in [name[len("minor-") :] for name in found if name.startswith("minor-")]:
        found |= {"minor"} if f"{language}:sexual" in found or f"sexual-{language}" in found else set()
    for language in [name[len("sexual-") :] for name in found if name.startswith("sexual-")]:
        found |= {"sexual"} if f"{language}:minor" in found or f"minor-{language}" in found else set()
    if {"sexual", "relative"} <= found:
        found.add("minor")
    return frozenset(found & {"minor", "sexual"})


# ---------------------------------------------------------------- normal forms
def _plain(text: str) -> str:
    """NFKC without invisible characters and accents; in the script and case that it was written in."""
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKD", _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)))
    return unicodedata.normalize("NFC", _MARKS.sub("", text))


class _LatinLetters(dict):
    """For `str.translate`: the Latin letter that a character looks like, by Unicode's table of confusables, or itself."""

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


def _forms(prompt: str) -> Iterator[tuple[list[str], bool]]:
    """The lists of tokens of a prompt that are looked up, and whether letters of a list may be a word spelled out."""
    own = _plain(prompt)
    latin = own if own.isascii() else own.translate(_LATIN)
    for text in dict.fromkeys((own, latin)):
        lower = _numbers(text.casefold())
        yield _TOKEN.findall(lower), True
        split = _CAMEL.sub(" ", text)
        if split != text:
            yield _TOKEN.findall(_numbers(split.casefold())), False
        for changed in dict.fromkeys(_from_leet(lower)):
            if changed != lower:
                yield _TOKEN.findall(changed), False
        joined = list(_joined(lower))
        if joined:
            yield joined, False


def _numbers(text: str) -> str:
    """Thousands without commas, decimals cut, ranges and "less than" in words."""
    if "<" in text:
        text = re.sub(r"<=?\s?(?=\d)", " under ", text)
    text = re.sub(r"(?<=\d),(?=\d\d\d(?!\d))", "", text)
    text = re.sub(r"(?<=\d)\.\d+", "", text)
    return re.sub(r"(?<=\d)\s?[-‐‑–—~/]\s?(?=\d)", " to ", text)


def _from_leet(text: str) -> Iterator[str]:
    """The text with digits and signs inside words as the letters that they stand for."""

    def letters(match: re.Match, table: dict) -> str:
        chunk = match[0].strip("!|+.,;:?\"'()[]{}")
        if chunk.isalpha() or not any(map(str.isalpha, chunk)):
            return match[0]
        return chunk.translate(table)

    if text.isalpha() or not _LEET_SIGN.search(text):
        return
    for table in _LEETS:
        yield _LEET_CHUNK.sub(lambda match, table=table: letters(match, table), text)


def _joined(text: str) -> Iterator[str]:
    """Words that signs cut in pieces, and words with a letter drawn out."""
    for chunk in text.split():
        if chunk.isalpha() and not _TRIPLED.search(chunk):
            continue
        parts = [part for part in _TOKEN.findall(chunk) if not part.isdecimal()]
        whole = "".join(parts)
        shorter = _TRIPLED.sub(r"\1", whole)
        yield from (whole, "") if len(parts) > 1 else ()
        yield from (shorter, "") if shorter != whole else ()


# ---------------------------------------------------------------- looking up
@cache
def _terms() -> tuple[dict[str, frozenset[str]], dict[str, frozenset[str]], dict[str, list[tuple[list[str], frozenset[str]]]]]:
    """Words, beginnings of words, and phrases by their first word, each with its kinds."""
    words: dict[str, frozenset[str]] = {}
    stems: dict[str, frozenset[str]] = {}
    phrases: dict[str, list[tuple[list[str], frozenset[str]]]] = {}
    for language, kinds in _TABLE.items():
        for kind, terms in kinds.items() if len(language) == 2 and language not in ("zh", "ja") else ():
            names = frozenset(_names(kind, language))
            for term in terms:
                pattern = _pattern(term)
                if len(pattern) > 1:
                    phrases.setdefault(pattern[0], []).append((pattern, names))
                elif pattern[0].endswith("*"):
                    stems[pattern[0][:-1]] = stems.get(pattern[0][:-1], frozenset()) | names
                else:
                    words[pattern[0]] = words.get(pattern[0], frozenset()) | names
    return words, stems, phrases


def _names(kind: str, language: str) -> list[str]:
    if kind.startswith("local_"):
        return [f"{kind.removeprefix('local_')}-{language}"]
    if kind == "both":
        return ["minor", "sexual", f"{language}:minor", f"{language}:sexual"]
    return [kind, f"{language}:{kind}"]


def _pattern(term: str) -> list[str]:
    """A term of the tables as tokens, of which the last may end in *."""
    tokens = _TOKEN.findall(_plain(term).casefold())
    return [*tokens[:-1], tokens[-1] + "*" * term.endswith("*")]


def _is(token: str, pattern: str) -> bool:
    return token.startswith(pattern[:-1]) if pattern.endswith("*") else token == pattern


def _matches(words: list[str], start: int, pattern: list[str]) -> bool:
    return start + len(pattern) <= len(words) and all(_is(words[start + i], each) for i, each in enumerate(pattern))


@lru_cache(maxsize=2**16)
def _kinds_of_word(word: str) -> frozenset[str]:
    words, stems, _ = _terms()
    if len(word) > _LONGEST_TOKEN:
        return frozenset()
    found = set(words.get(word, ()))
    for end in range(2, len(word) + 1):
        found |= stems.get(word[:end], frozenset())
    if not found and "\u0600" <= word[:1] <= "\u06ff":
        for prefix in _ARABIC_PREFIXES:
            if word.startswith(prefix) and len(word) > len(prefix) + 1:
                found |= words.get(word[len(prefix) :], frozenset())
    if not found:  # a minor and a sexual word written as one
        for cut in range(3, len(word) - 2):
            both = words.get(word[:cut], frozenset()) | words.get(word[cut:], frozenset())
            if {"minor", "sexual"} <= both:
                found |= both
    return frozenset(found)


def _kinds_of_words(words: list[str], spelled_out: bool) -> set[str]:
    different = set(words)
    if not different.isdisjoint(_struck()):
        words = _strike(words)
    found: set[str] = set()
    for word in set(words):
        found |= _kinds_of_word(word)
    phrases = _terms()[2]
    if not different.isdisjoint(phrases):
        for start, word in enumerate(words):
            for pattern, names in phrases.get(word, ()):
                if _matches(words, start, pattern):
                    found |= names
    if any(map(_may_be_an_age, different)) and _names_an_age(words):
        found |= {"minor", "en:minor"}
    if spelled_out:
        found |= _kinds_of_letters(words)
    return found


def _strike(words: list[str]) -> list[str]:
    """The words without the harmless phrases, a gap in the place of each."""
    kept, at, struck = [], 0, _struck()
    while at < len(words):
        longest = max((len(each) for each in struck.get(words[at], ()) if _matches(words, at, each)), default=0)
        kept.append("" if longest else words[at])
        at += longest or 1
    return kept


@cache
def _struck() -> dict[str, list[list[str]]]:
    found: dict[str, list[list[str]]] = {}
    for term in _TABLE["struck"]["phrases"]:
        found.setdefault(_pattern(term)[0], []).append(_pattern(term))
    return found


def _kinds_of_letters(words: list[str]) -> set[str]:
    """The terms within runs of three or more single letters."""
    found: set[str] = set()
    run: list[str] = []
    for word in [*words, ""]:
        if len(word) == 1:
            run.append(word)
            continue
        if len(run) >= 3:
            for table in _LEETS:
                for match in _within().finditer("".join(run).translate(table)):
                    found |= set().union(*(_kinds_of_word(term) for term in _all_prefixes(match[1])))
        run = []
    return found


@cache
def _within() -> re.Pattern:
    """Any word of three letters or more, wherever it begins."""
    words, stems, _ = _terms()
    longest_first = sorted({*words, *stems}, key=len, reverse=True)
    return re.compile(f"(?=({'|'.join(re.escape(word) for word in longest_first if len(word) > 2)}))")


def _all_prefixes(word: str) -> list[str]:
    return [word[:end] for end in range(3, len(word) + 1)]


# ---------------------------------------------------------------- ages
@cache
def _ages() -> dict[str, frozenset[str]]:
    age = _TABLE["age"]

    def split(name: str) -> frozenset[str]:
        lines = age[name] if isinstance(age[name], list) else [age[name]]
        return frozenset(word for line in lines for word in _TOKEN.findall(_plain(line).casefold()))

    small = frozenset(word for line in age["numbers"] for word in _TOKEN.findall(_plain(line).casefold())[:3])
    return {name: split(name) for name in ("numbers", "eighteen", "tens", "ordinals", "joins", "stages")} | {"small": small}


@cache
def _age_patterns(name: str) -> tuple[dict[str, list[list[str]]], list[list[str]]]:
    """The patterns of a list: by their first token where that is a whole word, and those that begin with the start of one."""
    exact: dict[str, list[list[str]]] = {}
    open_ended = []
    for term in _TABLE["age"][name]:
        pattern = _pattern(term)
        if pattern[0].endswith("*"):
            open_ended.append(pattern)
        else:
            exact.setdefault(pattern[0], []).append(pattern)
    return exact, open_ended


def _follows(words: list[str], start: int, name: str) -> bool:
    exact, open_ended = _age_patterns(name)
    first = words[start] if start < len(words) else ""
    return any(_matches(words, start, each) for each in (*exact.get(first, ()), *open_ended))


def _precedes(words: list[str], end: int, name: str) -> bool:
    """Whether the words before `end` end with an entry of the list."""
    exact, _ = _age_patterns(name)
    for size in range(1, min(5, end) + 1):
        if any(len(each) == size and _matches(words, end - size, each) for each in exact.get(words[end - size], ())):
            return True
    return False


def _is_number(word: str, limit: int) -> bool:
    """Whether a word is a number below `limit`, which is 18 or 19."""
    if word.isdecimal():
        return len(word) <= 3 and int(word) < limit
    return word in _ages()["numbers"] or (limit > 18 and word in _ages()["eighteen"])


@lru_cache(maxsize=2**16)
def _may_be_an_age(word: str) -> bool:
    return word in _ages()["ordinals"] or _is_number(word, 19) or _is_glued_age(word)


def _within_a_larger_number(words: list[str], at: int) -> bool:
    """Whether a number is the last part of a larger one, as in twenty-one, or its first, as in five hundred."""
    ages, before = _ages(), words[max(at - 2, 0) : at]
    if before and (before[-1] in ages["tens"] or (before[0] in ages["tens"] and before[-1] in ages["joins"])):
        return True
    return at + 1 < len(words) and words[at + 1] in ages["tens"]


def _names_an_age(words: list[str]) -> bool:
    """Whether an age below 18 is among the words, in any of the phrasings of never_drawn.toml."""
    ages = _ages()
    for at, word in enumerate(words):
        if not _may_be_an_age(word):
            continue
        if word in ages["ordinals"] or _is_number(word, 19):
            if _within_a_larger_number(words, at):
                continue
            after = at + 2 if words[at + 1 : at + 2] and words[at + 1] in ("st", "nd", "rd", "th") else at + 1
            young = word in ages["ordinals"] or _is_number(word, 18)
            if young and words[after : after + 1] and words[after] in ages["stages"]:
                return True
            if word in ages["ordinals"]:
                continue
            if young and (_follows(words, at + 1, "after") or _precedes(words, at, "before") or _range(words, at)):
                return True
            if word not in ages["small"] and _precedes(words, at, "below") and not _follows(words, at + 1, "units"):
                return True
        else:  # a number and its unit in one word
            return True
    return False


def _range(words: list[str], at: int) -> bool:
    """Whether a number begins a range of ages, as in 12 to 18 years old."""
    rest = words[at + 1 : at + 3]
    return (
        len(rest) == 2
        and rest[0] in ("to", "or", "and", "through")
        and rest[1].isdecimal()
        and _follows(words, at + 3, "after")
    )


@lru_cache(maxsize=2**16)
def _is_glued_age(word: str) -> bool:
    """Whether a word is a number in words and what makes an age of it, as German writes them."""
    for ending in _TABLE["age"]["compounds"]:
        start, found, _ = word.partition(_pattern(ending)[0][:-1])
        if found and start in _ages()["numbers"]:
            return True
    return False


# ---------------------------------------------------------------- Chinese and Japanese
@cache
def _cjk_terms() -> tuple[dict[str, re.Pattern], re.Pattern, re.Pattern]:
    """A pattern for each kind, one for ages below 18, and one for "under 18"."""

    def any_of(terms: list[str]) -> str:
        return "|".join(map(re.escape, terms))

    kinds = {
        kind: re.compile(any_of([_plain(term) for language in ("zh", "ja") for term in _TABLE[language][kind]]))
        for kind in ("minor", "relative", "sexual")
    }
    cjk, digit = _TABLE["cjk"], "一二三四五六七八九十百千两兩零〇"
    number = rf"(?<![\d{digit}])(?:[1-9]|1[0-7]|十[一二三四五六七]?|[一二三四五六七八九两兩])"
    eighteen = rf"(?<![\d{digit}])(?:[1-9]|1[0-8]|十[一二三四五六七八]?)"
    age = re.compile(f"{number}(?:{any_of([_plain(term) for term in cjk['ages']])})")
    below, after = any_of(cjk["below"]), any_of(cjk["after_below"])
    unit = any_of([_plain(term) for term in cjk["ages"]])
    return kinds, age, re.compile(f"(?:{below}){eighteen}(?!\\d)|{eighteen}(?:{unit})(?:{after})")


def _kinds_of_cjk(text: str) -> set[str]:
    if not _CJK.search(text):
        return set()
    together = re.sub(r"[\W_]+", "", text)
    kinds, age, below = _cjk_terms()
    found = {kind for kind, pattern in kinds.items() if pattern.search(together)}
    return found | ({"minor"} if age.search(together) or below.search(together) else set())
