"""Detecting ages below 18 in a prompt: numbers in digits and words, ordinals, ranges and limits, as listed in never_drawn.toml."""

from functools import cache, lru_cache

from des.data.prompt_forms import TABLE, TOKEN, matches, pattern_of, plain


@cache
def _ages() -> dict[str, frozenset[str]]:
    age = TABLE["age"]

    def split(name: str) -> frozenset[str]:
        lines = age[name] if isinstance(age[name], list) else [age[name]]
        return frozenset(word for line in lines for word in TOKEN.findall(plain(line).casefold()))

    small = frozenset(word for line in age["numbers"] for word in TOKEN.findall(plain(line).casefold())[:3])
    return {name: split(name) for name in ("numbers", "eighteen", "tens", "ordinals", "joins", "stages")} | {"small": small}


@cache
def _age_patterns(name: str) -> tuple[dict[str, list[list[str]]], list[list[str]]]:
    """Return a list's patterns in two groups: those that begin with a whole word, by that word, and those that begin with a prefix."""
    exact: dict[str, list[list[str]]] = {}
    open_ended = []
    for term in TABLE["age"][name]:
        pattern = pattern_of(term)
        if pattern[0].endswith("*"):
            open_ended.append(pattern)
        else:
            exact.setdefault(pattern[0], []).append(pattern)
    return exact, open_ended


def _follows(words: list[str], start: int, name: str) -> bool:
    exact, open_ended = _age_patterns(name)
    first = words[start] if start < len(words) else ""
    return any(matches(words, start, each) for each in (*exact.get(first, ()), *open_ended))


def _precedes(words: list[str], end: int, name: str) -> bool:
    """Whether the words before `end` end with an entry of the list."""
    exact, _ = _age_patterns(name)
    for size in range(1, min(5, end) + 1):
        if any(len(each) == size and matches(words, end - size, each) for each in exact.get(words[end - size], ())):
            return True
    return False


def _is_number(word: str, limit: int) -> bool:
    """Whether a word is a number below `limit`, which is 18 or 19."""
    if word.isdecimal():
        return len(word) <= 3 and int(word) < limit
    return word in _ages()["numbers"] or (limit > 18 and word in _ages()["eighteen"])


@lru_cache(maxsize=2**16)
def may_be_an_age(word: str) -> bool:
    return word in _ages()["ordinals"] or _is_number(word, 19) or _is_glued_age(word)


def _within_a_larger_number(words: list[str], at: int) -> bool:
    """Whether a number is the last part of a larger one, as in twenty-one, or the first, as in five hundred."""
    ages, before = _ages(), words[max(at - 2, 0) : at]
    if before and (before[-1] in ages["tens"] or (before[0] in ages["tens"] and before[-1] in ages["joins"])):
        return True
    return at + 1 < len(words) and words[at + 1] in ages["tens"]


def names_an_age(words: list[str]) -> bool:
    """Whether the words name an age below 18 in any phrasing that never_drawn.toml lists."""
    ages = _ages()
    for at, word in enumerate(words):
        if not may_be_an_age(word):
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
    """Whether a word joins a number word and an ending that makes it an age, as German compounds do."""
    for ending in TABLE["age"]["compounds"]:
        start, found, _ = word.partition(pattern_of(ending)[0][:-1])
        if found and start in _ages()["numbers"]:
            return True
    return False
