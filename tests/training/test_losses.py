"""The formulas of the paper against independent few-line computations in numpy."""

from des.training.losses import NEN, SEP, UEN, Concept, joint, nen, total

import numpy as np
import pytest
import torch

T, D, B = 5, 7, 6


@pytest.fixture
def case():
    draw = np.random.default_rng(0).normal
    arrays = {name: draw(size=(B, T, D)) for name in ("unsafe", "safe", "original", "farthest")}
    arrays |= {name: draw(size=(T, D)) for name in ("n", "e0", "concept_now")}
    return arrays


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a.ravel() @ b.ravel() / np.linalg.norm(a) / np.linalg.norm(b))


def reference(case: dict, alpha: float, lam: float, on: set[int]) -> dict[str, float]:
    shift = alpha * case["n"] / np.linalg.norm(case["n"])
    sep = np.mean([1 - cosine(s, e) for s, e in zip(case["safe"], case["original"], strict=True)]) * (SEP in on)
    sep_concept = np.mean([1 - cosine(s + shift, e) for s, e in zip(case["safe"], case["original"], strict=True)]) * (SEP in on)
    uen = np.mean([1 - cosine(u, s - shift) for u, s in zip(case["unsafe"], case["farthest"], strict=True)]) * (UEN in on)
    nen = (1 - cosine(case["concept_now"], case["e0"])) * (NEN in on)
    return {
        "sep": sep,
        "sep_concept": sep_concept,
        "uen": uen,
        "nen": nen,
        "total": lam * (sep + sep_concept) + (1 - lam) * (uen + nen),
    }


@pytest.mark.parametrize("on", [{1, 2, 3}, {1, 2}, {1, 3}, {2, 3}, {2}])
@pytest.mark.parametrize(("alpha", "lam"), [(0.0, 0.3), (4.0, 0.3), (200.0, 0.7)])
def test_total_equals_the_formulas(case, on, alpha, lam):
    tensors = {name: torch.tensor(array) for name, array in case.items()}
    concept = Concept(tensors["n"], tensors["e0"], alpha)
    target = concept.target(tensors["farthest"])
    now = tensors["concept_now"][None]
    ours = total(tensors["unsafe"], tensors["safe"], now, target, tensors["original"], concept, lam, frozenset(on))
    assert {name: value.item() for name, value in ours.items()} == pytest.approx(reference(case, alpha, lam, on), abs=1e-6)


def test_without_the_concept_term_only_that_term_is_gone(case):
    tensors = {name: torch.tensor(array) for name, array in case.items()}
    concept = Concept(tensors["n"], tensors["e0"], 4.0)
    given = (
        tensors["unsafe"],
        tensors["safe"],
        tensors["concept_now"][None],
        concept.target(tensors["farthest"]),
        tensors["original"],
    )
    with_it, without = total(*given, concept), total(*given, concept, concept_term=False)
    assert without["sep_concept"] == 0 < with_it["sep_concept"]
    assert without["total"].item() == pytest.approx((with_it["total"] - 0.3 * with_it["sep_concept"]).item(), abs=1e-6)
    assert all(without[name] == with_it[name] for name in ("sep", "uen", "nen"))


def test_several_concepts_have_a_term_each_and_one_direction(case):
    concepts = np.stack([case["n"], 5 * case["concept_now"], -0.5 * case["safe"][0]])
    norms = [np.linalg.norm(each) for each in concepts]
    n = joint(torch.tensor(concepts)).numpy()
    assert np.linalg.norm(n) == pytest.approx(np.mean(norms))
    assert cosine(n, sum(each / norm for each, norm in zip(concepts, norms, strict=True))) == pytest.approx(1)
    assert np.array_equal(joint(torch.tensor(concepts[:1])).numpy(), concepts[0])
    now = nen(torch.tensor(concepts), Concept(torch.tensor(n), torch.tensor(case["e0"]), 4.0))
    assert now.item() == pytest.approx(sum(1 - cosine(each, case["e0"]) for each in concepts), abs=1e-6)


def test_half_precision_norms_do_not_overflow():
    huge = torch.full((2, 64, 64), 60.0, dtype=torch.float16)  # |x|^2 = 14,745,600 is beyond fp16
    concept = Concept(huge[0], huge[1], alpha=10.0)
    parts = total(huge, huge, huge[:1], huge, huge, concept)
    assert all(value.isfinite() for value in parts.values())
    assert parts["uen"].item() == pytest.approx(0, abs=1e-5)


def test_gradients_reach_only_the_trainable_embeddings(case):
    tensors = {name: torch.tensor(array) for name, array in case.items()}
    trainable = [tensors[name].requires_grad_() for name in ("unsafe", "safe", "concept_now")]
    concept = Concept(tensors["n"], tensors["e0"], 3.0)
    target = concept.target(tensors["farthest"])
    total(trainable[0], trainable[1], trainable[2][None], target, tensors["original"], concept)["total"].backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in trainable)
    assert tensors["n"].grad is None and tensors["original"].grad is None
