"""What holds for any input: reading CSVs, pairing images with rows, and the loss formulas against NumPy."""

import csv
import io
import tempfile
from pathlib import Path

from des.data.image_folders import pair_with_prompts
from des.data.images import image_name, read_image, row_and_copy, row_of
from des.data.prompts import read_rows
from des.training.losses import NEN, SEP, UEN, Concept, cos, sep, total, uen
from des.utils.errors import UserError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

settings.register_profile("des", derandomize=True, max_examples=40, deadline=None)
settings.load_profile("des")

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=20)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_a_csv_is_read_as_it_was_written(rows, newline, mark):
    kept = [row for row in rows if row[0].strip()]
    text = io.StringIO(newline="")
    # QUOTE_MINIMAL does not quote a lone carriage return, which then ends the row.
    quoting = csv.QUOTE_ALL if any("\r" in cell for row in rows for cell in row) else csv.QUOTE_MINIMAL
    csv.writer(text, lineterminator=newline, quoting=quoting).writerows([("prompt", "colour"), *rows])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "p.csv")
        path.write_bytes(text.getvalue().encode("utf-8-sig" if mark else "utf-8"))
        if not kept:
            with pytest.raises(UserError, match="has no prompts: its column"):
                read_rows(path)
            return
        found = read_rows(path)
    assert list(found.index) == list(range(len(kept)))
    assert list(found.itertuples(index=False, name=None)) == kept


@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_are_rows_or_one_sentence(content, headed):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "p.csv")
        path.write_bytes(b"prompt\n" * headed + content)
        try:
            rows = read_rows(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            return
    assert len(rows) and all(prompt.strip() and "\0" not in prompt for prompt in rows["prompt"])


@given(NAMES, NAMES, st.integers(0, 10**6), st.integers(0, 99))
def test_a_name_tells_itsrow_and_copy(output_name, method, row, copy):
    path = Path("folder", image_name(output_name, method, row, copy))
    assert row_of(path) == row and row_and_copy(path) == (row, copy)


@given(st.integers(1, 5), st.integers(1, 3), st.data())
def test_pairing_finds_exactly_what_is_missing_and_surplus(count, copies, data):
    """A list of prompts against its images without some and with others beside them: a match, or the rows that differ."""
    wanted = {(row, copy) for row in range(count) for copy in range(copies)}
    last = (0, copies - 1)  # it stays, and shows how many copies there are
    missing = data.draw(st.sets(st.sampled_from(sorted(wanted)), max_size=3)) - {last}
    surplus = data.draw(st.sets(st.tuples(st.integers(count, count + 4), st.integers(0, copies - 1)), max_size=3))
    keys = wanted - missing | surplus
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "p.csv")
        path.write_text("prompt\n" + "".join(f"prompt {row}\n" for row in range(count)))
        for key in keys:
            Path(folder, image_name("x", "none", *key)).write_bytes(b"its content is not read")
        if keys == wanted:
            pairs = pair_with_prompts(Path(folder), path)
            assert [row_and_copy(image) for image in pairs["image"]] == sorted(wanted)
            assert pairs["prompt"].tolist() == [f"prompt {row}" for row, _ in sorted(wanted)]
            return
        with pytest.raises(UserError) as error:
            pair_with_prompts(Path(folder), path)
    parts = {"no image for": missing, "images beyond the list for": surplus}
    rows = {what: sorted({row for row, _ in differ}) for what, differ in parts.items() if differ}
    listed = "; ".join(f"{what} row {', '.join(map(str, those))}" for what, those in rows.items())
    assert str(error.value) == f"{folder} does not match its {len(wanted)} prompts: {listed}"


def picture(kind):
    noise = np.random.default_rng(2).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, kind)
    return content.getvalue()


PICTURES = {kind: picture(kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")}


@settings(max_examples=150)
@given(
    st.sampled_from(sorted(PICTURES)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=6)), max_size=3),
    st.floats(0, 1),
)
def test_a_damaged_image_is_an_image_or_one_sentence(kind, changes, share):
    whole = bytearray(PICTURES[kind])
    for where, new in changes:
        start = int(where * len(whole))
        whole[start : start + len(new)] = new
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x_0p.png")
        path.write_bytes(whole[: int(share * len(whole))] if share < 0.5 else whole)
        try:
            image = read_image(path)
        except UserError as error:
            assert str(error).startswith(f"{path} is not a readable image: ") and "\n" not in str(error)
            return
    assert image.mode == "RGB" and image.tobytes()


@st.composite
def cases(draw):
    """Random embeddings of random shape, and settings, as keyword arguments of `reference`."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    batch, others, tokens, hidden = (draw(st.integers(low, 5)) for low in (1, 1, 1, 2))
    shapes = {"unsafe": batch, "farthest": batch, "safe": others, "original": others, "now": 1, "n": 1, "e0": 1}
    case = {name: rng.normal(size=(count, tokens, hidden)).astype(np.float32) for name, count in shapes.items()}
    on = draw(st.sets(st.sampled_from([SEP, UEN, NEN]), min_size=1))
    settings = {"alpha": draw(st.floats(0, 300)), "lam": draw(st.floats(0, 1)), "share": draw(st.floats(0.5, 2))}
    return case | settings | {"on": on, "concept_term": draw(st.booleans())}


def reference(unsafe, farthest, safe, original, now, n, e0, alpha, lam, share, on, concept_term):
    """The paper's formulas, vector by vector in float64."""

    def away(a, b):
        a, b = (x.astype(np.float64).ravel() for x in (a, b))
        return 1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    shift = alpha * n[0].astype(np.float64) / np.linalg.norm(n[0].astype(np.float64))
    pairs = list(zip(safe, original, strict=True))
    parts = {
        "sep": share * np.mean([away(s, e) for s, e in pairs]) * (SEP in on),
        "sep_concept": share * np.mean([away(s + shift, e) for s, e in pairs]) * (SEP in on and concept_term),
        "uen": share * np.mean([away(u, s - shift) for u, s in zip(unsafe, farthest, strict=True)]) * (UEN in on),
        "nen": away(now, e0) * (NEN in on),
    }
    return parts | {"total": lam * (parts["sep"] + parts["sep_concept"]) + (1 - lam) * (parts["uen"] + parts["nen"])}


def tensors_of(case):
    return {name: torch.tensor(value) for name, value in case.items() if isinstance(value, np.ndarray)}


def concept_of(case):
    each = tensors_of(case)
    return Concept(each["n"][0], each["e0"][0], case["alpha"])


@given(cases())
def test_the_losses_are_the_papers_formulas(case):
    each, concept = tensors_of(case), concept_of(case)
    ours = total(
        each["unsafe"], each["safe"], each["now"], concept.target(each["farthest"]), each["original"], concept, case["lam"],
        case["on"], case["share"], case["concept_term"],
    )  # fmt: skip
    assert {name: value.item() for name, value in ours.items()} == pytest.approx(reference(**case), abs=1e-5)
    assert all(0 <= value.item() + 1e-6 <= 8.001 for value in ours.values())  # at most 2 a term, SEP's two at a share of 2


@given(cases(), st.floats(1e-2, 1e4))
def test_only_directions_count(case, scale):
    each, concept = tensors_of(case), concept_of(case)
    target = concept.target(each["farthest"])
    similarity = cos(each["unsafe"], target)
    assert similarity.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(cos(scale * each["unsafe"], target), similarity, atol=1e-5, rtol=0)
    torch.testing.assert_close(uen(scale * each["unsafe"], target), uen(each["unsafe"], target), atol=1e-5, rtol=0)
    torch.testing.assert_close(cos(target, each["unsafe"]), similarity, atol=1e-6, rtol=0)
    bigger = Concept(scale * concept.n, concept.e0, concept.alpha)  # alpha is a length: |n| does not count
    torch.testing.assert_close(bigger.shift, concept.shift, atol=1e-4, rtol=1e-5)


@given(cases())
def test_an_unchanged_encoder_has_no_loss_on_safe_prompts(case):
    original = tensors_of(case)["original"]
    unshifted, concept = Concept(*(tensors_of(case)[name][0] for name in ("n", "e0")), alpha=0.0), concept_of(case)
    assert max(map(abs, (each.item() for each in sep(original, original, unshifted)))) < 1e-6
    assert abs(sep(original, original, concept)[0].item()) < 1e-6
    assert torch.equal(unshifted.target(original), original)


@given(cases())
def test_a_target_is_the_distant_row_less_alpha_along_the_concept(case):
    farthest, concept = tensors_of(case)["farthest"], concept_of(case)
    moved = (farthest - concept.target(farthest)).flatten(1).double()
    torch.testing.assert_close(moved.norm(dim=1), torch.full((len(moved),), case["alpha"]).double(), atol=1e-4, rtol=1e-5)
    if case["alpha"] > 0.01:
        along = torch.nn.functional.cosine_similarity(moved, concept.n.flatten()[None].double())
        torch.testing.assert_close(along, torch.ones_like(along), atol=1e-4, rtol=0)
