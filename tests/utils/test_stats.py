"""The exact McNemar test and the stratified interval; and that docs/tables.md says of its counts what they give."""

import math
import re

from des.tables.build import paired_note
from des.utils.stats import Paired, mcnemar, mcnemar_range, show_p, stratified, wilson

import pytest
from conftest import ROOT
from scipy.stats import binom


def test_mcnemar_against_values_by_hand():
    """Twice the tail of a fair coin: 6 heads of 6 give 2/64, 1 of 8 gives 2 * 9/256."""
    assert mcnemar(6, 0) == pytest.approx(2 / 64) and mcnemar(0, 6) == mcnemar(6, 0)
    assert mcnemar(7, 1) == pytest.approx(18 / 256)
    assert mcnemar(3, 3) == mcnemar(0, 0) == 1
    with pytest.raises(ValueError, match="no count"):
        mcnemar(-1, 3)


def test_pairs_are_by_key_and_not_by_order():
    first = {("plain", 0): True, ("plain", 1): True, ("names", 0): False, ("names", 1): True}
    second = {key: key == ("names", 1) for key in reversed(first)}
    pair = Paired.of(first, second)
    assert pair == Paired(n=4, first_only=2, second_only=0) and pair.p == 0.5
    for other in ({}, {key: True for key in first if key[1]}, first | {("plain", 2): True}):
        with pytest.raises(ValueError, match="same prompts"):
            Paired.of(first, other)


@pytest.mark.parametrize(("first", "second", "n"), [(6, 5, 20), (6, 1, 20), (15, 18, 20), (0, 0, 5)])
def test_counts_bound_the_p_value(first, second, n):
    """Every overlap that two sets of images of these sizes can have, and no other."""
    values = [mcnemar(first - k, second - k) for k in range(n + 1) if k <= min(first, second) and first + second - k <= n]
    assert mcnemar_range(first, second, n) == (min(values), max(values))


def test_counts_with_a_zero_leave_one_p_value():
    assert mcnemar_range(3, 0, 300) == (0.25, 0.25) and mcnemar_range(300, 297, 300) == (0.25, 0.25)
    with pytest.raises(ValueError, match="between 0 and 5"):
        mcnemar_range(6, 1, 5)


def test_a_stratified_interval_by_hand():
    (low_a, high_a), (low_b, high_b) = wilson(3, 100), wilson(0, 50)
    mean, low, high = stratified([(3, 100), (0, 50)])
    assert mean == pytest.approx(0.015)
    assert low == pytest.approx(0.015 - math.sqrt((0.03 - low_a) ** 2 + (0 - low_b) ** 2) / 2)
    assert high == pytest.approx(0.015 + math.sqrt((high_a - 0.03) ** 2 + (high_b - 0) ** 2) / 2)
    assert stratified([(3, 60)]) == pytest.approx((0.05, *wilson(3, 60)))
    low, high = stratified([(0, 7), (0, 9)])[1:]
    assert low == 0 < high < wilson(0, 7)[1]
    for wrong in ([], [(1, 0)], [(3, 2)]):
        with pytest.raises(ValueError, match="no "):
            stratified(wrong)


@pytest.mark.parametrize(("p", "q"), [(0.02, 0.5), (0.1, 0.1), (0.5, 0.7), (0.05, 0.1)])
def test_a_stratified_interval_covers_the_mean(p, q):
    """By every outcome of two strata of 15 and 40 images, weighted by its probability."""
    covered = 0.0
    for a in range(16):
        for b in range(41):
            _, low, high = stratified([(a, 15), (b, 40)])
            covered += binom.pmf(a, 15, p) * binom.pmf(b, 40, q) * (low <= (p + q) / 2 <= high)
    assert covered > 0.93


def test_a_note_names_the_rows_that_differ():
    keys = [("plain", row) for row in range(8)]
    verdicts = {"DES": dict.fromkeys(keys, False), "original": dict.fromkeys(keys, True)}
    one = paired_note(verdicts, "DES")
    assert one == (
        "Exact McNemar test against DES, on the same 8 prompts: original p = 0.0078 (8 images count only for original, 0 only for DES)."
    )
    two = paired_note(verdicts | {"ESD": dict.fromkeys(keys, False)}, "DES")
    assert "ESD p = 1 (0 images" in two and "p must be below 0.025" in two
    assert paired_note({"DES": verdicts["DES"]}, "DES") is None
    assert show_p(1e-9) == "p < 0.0001" and show_p(0.03125) == "p = 0.031"


# ---------------------------------------------------------------- docs/tables.md


def pages_claims() -> list[tuple[int, int, int, str]]:
    """Every `k against m of n images (p = ...)` of the page."""
    text = " ".join((ROOT / "docs/tables.md").read_text().split())
    found = re.findall(r"(\d+) against (\d+) of (\d+) images \((p [^)]*)\)", text)
    return [(int(k), int(m), int(n), shown) for k, m, n, shown in found]


def test_the_pages_p_values_are_those_of_its_counts():
    claims = pages_claims()
    assert {(k, m) for k, m, *_ in claims} >= {(6, 5), (6, 0), (5, 0), (3, 0), (2, 0)}
    for k, m, n, shown in claims:
        low, high = mcnemar_range(k, m, n)
        expected = show_p(high) if show_p(low) == show_p(high) else f"{show_p(low)} to {high:.2g}"
        assert shown == expected, (k, m, n)


def test_the_pages_claims_are_about_counts_of_its_tables():
    text = (ROOT / "docs/tables.md").read_text()
    printed = set(re.findall(r"\((\d+)/(\d+)\)", text))
    for k, m, n, _ in pages_claims():
        assert {(str(k), str(n)), (str(m), str(n))} <= printed
