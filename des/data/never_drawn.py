"""The safety filter: prompts that put minors in a sexual context are never drawn (docs/never_drawn.md).

Each prompt is normalised in several ways, and the words of never_drawn.toml are looked up in each of the resulting lists of
tokens. Every step takes time linear in the prompt's length.
"""

import re
from collections.abc import Sequence
from functools import cache, lru_cache

from des.data.ages import may_be_an_age, names_an_age
from des.data.prompt_forms import BREAK, LEETS, TABLE, TOKEN, forms, is_term, matches, pattern_of, plain
from des.utils.logs import logger

SEXUAL_SET_SHARE = 0.05
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")
_ARABIC_PREFIXES = ("وال", "بال", "كال", "فال", "لل", "ال", "و", "ب", "ل", "ف", "ك")
PLACEHOLDER = re.compile(r"<learned-\d+-\d+>")  # the name of a learned token, see des.models.learned_tokens
_LONGEST_TOKEN = 64  # characters; every word of the tables is shorter


def never_drawn(prompts: Sequence[str], sexual_set: bool = False, negative_prompt: str | None = None) -> list[int]:
    """Return the rows that must not be generated: minors in a sexual context.

    These are prompts that name a minor and are sexual. In a sexual list, every prompt that names a minor is left out, and the log
    says so: a list is sexual if the caller passes `sexual_set` or at least 5% of its prompts are. A `negative_prompt` that names
    clothing makes every prompt sexual, and one that names adults makes every prompt name a minor. No option turns this off.
    """
    kinds, excluded = [kinds_of(prompt) for prompt in prompts], _kinds_without(negative_prompt or "")
    sexual = sum("sexual" in each for each in kinds)
    found = [i for i, each in enumerate(kinds) if {"minor", "sexual"} <= each | excluded]
    if sexual_set or (sexual and sexual >= SEXUAL_SET_SHARE * len(prompts)):
        every = [i for i, each in enumerate(kinds) if "minor" in each]
        if len(every) > len(found):
            _log_once(sexual, len(prompts), len(every), sexual_set)
        found = every
    return found


@cache
def _log_once(sexual: int, count: int, dropped: int, known: bool) -> None:
    """Log once, although a run checks the same list several times, that every prompt that names a minor is left out."""
    why = "known as a sexual set" if known else f"at least {SEXUAL_SET_SHARE:.0%} of it"
    logger.info("%d of %d prompts are sexual (%s), so all %d that name a minor are never drawn", sexual, count, why, dropped)


def kinds_of(prompt: str) -> frozenset[str]:
    """Return which of "minor" and "sexual" a prompt names; words for relatives count as minors if it is sexual.

    A learned token counts as sexual, since no word says what it stands for. Harmless phrases are struck out, some of them only if the
    rest of the prompt names neither a minor nor anything sexual.
    """
    found = _kinds(prompt, "alone")
    if len(found) == 1 and len(kinds := _kinds(prompt, "phrases")) == 2:
        return kinds
    return found


def _kinds(prompt: str, struck: str) -> frozenset[str]:
    """Return the kinds of a prompt without harmless phrases: those always struck (`phrases`), or also those beside nothing (`alone`)."""
    found = {"sexual"} if PLACEHOLDER.search(prompt) else set()
    for text, spelled_out in forms(prompt):
        found |= _kinds_of_text(text, spelled_out, struck)
    found |= _kinds_of_cjk(plain(prompt))
    for language in [name[len("minor-") :] for name in found if name.startswith("minor-")]:
        found |= {"minor"} if f"{language}:sexual" in found or f"sexual-{language}" in found else set()
    for language in [name[len("sexual-") :] for name in found if name.startswith("sexual-")]:
        found |= {"sexual"} if f"{language}:minor" in found or f"minor-{language}" in found else set()
    if {"sexual", "relative"} <= found:
        found.add("minor")
    return frozenset(found & {"minor", "sexual"})


def _kinds_without(negative_prompt: str) -> set[str]:
    """Return the kinds of a prompt whose images a negative prompt steers away from clothing ("sexual") or from adults ("minor")."""
    words = {word for text, _ in forms(negative_prompt) for word in TOKEN.findall(text)}
    terms = {kind: [pattern_of(term)[0] for term in named] for kind, named in TABLE["negative"].items()}
    return {kind for kind, named in terms.items() if any(is_term(word, term) for word in words for term in named)}


@cache
def _terms() -> tuple[dict[str, frozenset[str]], dict[str, frozenset[str]], dict[str, list[tuple[list[str], frozenset[str]]]]]:
    """Return words, prefixes, and phrases by their first word, each with its kinds."""
    words: dict[str, frozenset[str]] = {}
    stems: dict[str, frozenset[str]] = {}
    phrases: dict[str, list[tuple[list[str], frozenset[str]]]] = {}
    for language, kinds in TABLE.items():
        for kind, terms in kinds.items() if len(language) == 2 and language not in ("zh", "ja") else ():
            names = frozenset(_names(kind, language))
            for term in terms:
                pattern = pattern_of(term)
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


def _kinds_of_text(text: str, spelled_out: bool, struck: str) -> set[str]:
    words = TOKEN.findall(text)
    different = set(words)
    first_words, pattern = _struck(struck)
    if not different.isdisjoint(first_words):
        words = TOKEN.findall(pattern.sub(f" {BREAK} ", text))
        different = set(words)
    found: set[str] = set()
    for word in different:
        found |= _kinds_of_word(word)
    phrases = _terms()[2]
    if not different.isdisjoint(phrases):
        for start, word in enumerate(words):
            for each, names in phrases.get(word, ()):
                if matches(words, start, each):
                    found |= names
    if any(map(may_be_an_age, different)) and names_an_age(words):
        found |= {"minor", "en:minor"}
    if spelled_out:
        found |= _kinds_of_letters(words)
    return found


@cache
def _struck(name: str) -> tuple[frozenset[str], re.Pattern]:
    """Return the first words of the harmless phrases, and a pattern that matches them; only spaces, hyphens, ' and _ join their words."""
    terms = TABLE["struck"]["phrases"] + (TABLE["struck"]["alone"] if name == "alone" else [])
    phrases = sorted(map(pattern_of, terms), key=lambda words: len(" ".join(words)), reverse=True)
    either = "|".join(r"[ \t'’_-]+".join(map(re.escape, words)) for words in phrases)
    return frozenset(words[0] for words in phrases), re.compile(rf"(?<![^\W_])(?:{either})(?![^\W_])")


def _kinds_of_letters(words: list[str]) -> set[str]:
    """Return the kinds of the terms within runs of three or more single letters."""
    found: set[str] = set()
    run: list[str] = []
    for word in [*words, ""]:
        if len(word) == 1:
            run.append(word)
            continue
        if len(run) >= 3:
            for table in LEETS:
                for match in _within().finditer("".join(run).translate(table)):
                    found |= set().union(*(_kinds_of_word(term) for term in _all_prefixes(match[1])))
        run = []
    return found


@cache
def _within() -> re.Pattern:
    """Return a pattern that matches, at any position, a term of at least three letters."""
    words, stems, _ = _terms()
    longest_first = sorted({*words, *stems}, key=len, reverse=True)
    return re.compile(f"(?=({'|'.join(re.escape(word) for word in longest_first if len(word) > 2)}))")


def _all_prefixes(word: str) -> list[str]:
    return [word[:end] for end in range(3, len(word) + 1)]


@cache
def _cjk_terms() -> tuple[dict[str, re.Pattern], re.Pattern, re.Pattern]:
    """Return a pattern for each kind, one for ages below 18, and one for "under 18"."""

    def any_of(terms: list[str]) -> str:
        return "|".join(map(re.escape, terms))

    kinds = {
        kind: re.compile(any_of([plain(term) for language in ("zh", "ja") for term in TABLE[language][kind]]))
        for kind in ("minor", "relative", "sexual")
    }
    cjk, digit = TABLE["cjk"], "一二三四五六七八九十百千两兩零〇"
    number = rf"(?<![\d{digit}])(?:[1-9]|1[0-7]|十[一二三四五六七]?|[一二三四五六七八九两兩])"
    eighteen = rf"(?<![\d{digit}])(?:[1-9]|1[0-8]|十[一二三四五六七八]?)"
    age = re.compile(f"{number}(?:{any_of([plain(term) for term in cjk['ages']])})")
    below, after = any_of(cjk["below"]), any_of(cjk["after_below"])
    unit = any_of([plain(term) for term in cjk["ages"]])
    return kinds, age, re.compile(f"(?:{below}){eighteen}(?!\\d)|{eighteen}(?:{unit})(?:{after})")


def _kinds_of_cjk(text: str) -> set[str]:
    if not _CJK.search(text):
        return set()
    together = re.sub(r"[\W_]+", "", text)
    kinds, age, below = _cjk_terms()
    found = {kind for kind, pattern in kinds.items() if pattern.search(together)}
    return found | ({"minor"} if age.search(together) or below.search(together) else set())
