"""Proportions, their intervals, and paired tests."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054


def wilson(k: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of the proportion k / n, as two fractions (95% by default).

    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927). Raises ValueError unless 0 <= k <= n and n > 0.
    """
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"{k} of {n} is no proportion")
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return (0.0 if k == 0 else low), (1.0 if k == n else high)


def proportion(k: int, n: int) -> dict[str, float]:
    """Return `{"k", "n", "fraction", "low", "high"}` of k / n with its Wilson 95% interval."""
    low, high = wilson(k, n)
    return {"k": k, "n": n, "fraction": k / n, "low": low, "high": high}


def show(share: Mapping[str, float]) -> str:
    """A proportion as text: `3/60 = 5.0% [1.7, 13.7]`, the interval in percent."""
    low, high = 100 * share["low"], 100 * share["high"]
    return f"{share['k']}/{share['n']} = {100 * share['fraction']:.1f}% [{low:.1f}, {high:.1f}]"


@dataclass(frozen=True)
class Paired:
    """Verdicts on the images of two models for the same `n` prompts: the number of hits of the first only, and of the second only."""

    n: int
    first_only: int
    second_only: int

    @classmethod
    def of(cls, first: Mapping[Hashable, bool], second: Mapping[Hashable, bool]) -> "Paired":
        """Pair verdicts by their keys, such as set and row. Raises ValueError unless both have the same keys, at least one."""
        if not first or first.keys() != second.keys():
            raise ValueError("verdicts can only be paired if both models have one for each of the same prompts")
        differ = [bool(first[key]) for key in first if bool(first[key]) != bool(second[key])]
        return cls(len(first), sum(differ), len(differ) - sum(differ))

    @property
    def p(self) -> float:
        """The two-sided p value of the exact McNemar test."""
        return mcnemar(self.first_only, self.second_only)


def mcnemar(first_only: int, second_only: int) -> float:
    """The two-sided p value of the exact McNemar test, from the numbers of pairs whose verdicts differ; 1 if no pair differs.

    Under the null hypothesis, each such pair goes either way with probability 1/2, which makes it a binomial test. Source: Q. McNemar,
    Psychometrika 12 (1947). Raises ValueError for a negative count.
    """
    if first_only < 0 or second_only < 0:
        raise ValueError(f"{min(first_only, second_only)} pairs is no count")
    from scipy.stats import binomtest  # takes most of a second

    differ = first_only + second_only
    return float(binomtest(first_only, differ, 0.5).pvalue) if differ else 1.0


def mcnemar_range(first: int, second: int, n: int) -> tuple[float, float]:
    """The smallest and the largest p value of `mcnemar` that are possible for two counts of hits on the same `n` prompts.

    The counts do not determine the number of prompts on which both models have a hit, so every possible number is tried. If a count
    is 0 or `n`, both values are equal. Raises ValueError if a count is not between 0 and `n`.
    """
    if not (0 <= first <= n and 0 <= second <= n):
        raise ValueError(f"{first} and {second} are not both between 0 and {n}")
    both = range(max(0, first + second - n), min(first, second) + 1)
    values = [mcnemar(first - k, second - k) for k in both]
    return min(values), max(values)


def stratified(counts: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
    """The unweighted mean of several proportions k / n and its 95% interval (mean, low, high), as fractions.

    The interval combines the Wilson intervals of the strata by MOVER: the distance of each end to the mean is the root of the summed
    squares of theirs, divided by the number of strata. Source: G. Zou, W. Huang and X. Zhang, Comput. Stat. Data Anal. 53 (2009).
    Raises ValueError if there is no stratum, or one is no proportion.
    """
    if not counts:
        raise ValueError("there is no stratum to average")
    size = len(counts)
    shares, intervals = [k / n if n else math.nan for k, n in counts], [wilson(k, n) for k, n in counts]
    mean = math.fsum(shares) / size
    below = math.hypot(*(share - low for share, (low, _) in zip(shares, intervals, strict=True))) / size
    above = math.hypot(*(high - share for share, (_, high) in zip(shares, intervals, strict=True))) / size
    return mean, max(0.0, mean - below), min(1.0, mean + above)


def show_p(p: float) -> str:
    """A p value with two significant digits, as in `p = 0.031`; `p < 0.0001` below that."""
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}"
