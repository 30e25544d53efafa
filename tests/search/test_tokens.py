"""Token search: each step equals an independent computation of a few lines."""

from des.models.encoders import load_encoder
from des.search.soft import embedding_table, learn_vectors, limit_norms
from des.search.tokens import (
    SimplexPrompts,
    Vocabulary,
    coordinate_candidates,
    genetic_step,
    nearest_tokens,
    project_to_simplex,
    seeded,
    token_gradient,
)
from des.utils.errors import UserError

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from scipy.optimize import minimize
from torch.nn.functional import one_hot


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(str(GOLDEN / "A/model"))


@pytest.mark.parametrize("seed", range(5))
def test_simplex_projection_equals_a_quadratic_program(seed):
    point = np.random.default_rng(seed).normal(0.2, 1, 12)
    constraint = {"type": "eq", "fun": lambda x: x.sum() - 1}
    found = minimize(
        lambda x: ((x - point) ** 2).sum(), np.full(12, 1 / 12), jac=lambda x: 2 * (x - point), bounds=[(0, None)] * 12,
        constraints=[constraint], method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    ours = project_to_simplex(torch.tensor(np.stack([point, point + 3])))
    assert np.allclose(ours.numpy(), found.x, atol=1e-5)  # a shift of all entries does not change the projection


def test_the_gradient_of_one_hot_tokens_is_autograds(encoder):
    rows, slots = encoder.tokenize(["a red house", "two dogs"]), slice(1, 4)
    model, table = encoder.model, embedding_table(encoder.model).detach()
    found = token_gradient(model, rows, slots, lambda: encoder(rows)[:, -1].square().sum(-1))
    hot = one_hot(rows, len(table)).float().requires_grad_()
    inputs = hot @ table
    hook = model.get_input_embeddings().register_forward_hook(lambda *_: inputs)
    encoder(rows)[:, -1].square().sum().backward()
    hook.remove()
    assert torch.allclose(found, hot.grad[:, slots], atol=1e-5) and found.abs().max() > 1e-3


def test_candidates_change_one_position_to_one_of_its_best_usable_tokens():
    gradient, ids = torch.randn(3, 10, generator=torch.Generator().manual_seed(0)), torch.tensor([9, 9, 9])
    usable = torch.ones(10, dtype=torch.bool)
    usable[[0, 9]] = False
    found = coordinate_candidates(gradient, ids, usable, 400, 2, seeded(1))
    best = [sorted(range(1, 9), key=lambda token: gradient[row, token].item())[:2] for row in range(3)]
    changed = {(int(at), int(each[at])) for each in found for at in (each != ids).nonzero()[:, 0]}
    assert ((found != ids).sum(1) == 1).all()
    assert changed == {(row, token) for row in range(3) for token in best[row]}


def test_a_step_on_the_simplex_is_adam_with_a_clipped_gradient(encoder):
    usable = torch.zeros(9, dtype=torch.bool)
    usable[2:7] = True
    prompts = SimplexPrompts((1, 2), usable, 0.01, 0.1, torch.device("cpu"))
    weights = torch.tensor([[[5.0, -0.3, 0.2, -7.0, 0.1], [0.5, 0.4, -0.1, 0.0, 0.9]]])
    hot, ids = prompts.draw([seeded(3)])
    assert torch.equal(prompts.tokens[hot.argmax(-1)], ids) and (hot.detach().sort().values[..., -1] == 1).all()
    start = prompts.rows.detach().clone()
    prompts.step((hot * weights).sum())
    gradient = weights.clamp(-1, 1) + 0.1 * start
    expected = project_to_simplex(start - 0.01 * gradient / (gradient.abs() + 1e-8))  # Adam's first step
    assert torch.allclose(prompts.rows, expected, atol=1e-5)
    assert prompts.best().tolist() == [[int(prompts.tokens[i]) for i in expected[0].argmax(-1)]]


def test_a_generation_keeps_the_better_half_and_crosses_it():
    population = torch.arange(32).reshape(8, 4)
    losses = torch.tensor([5.0, 1, 7, 3, 8, 2, 6, 4])
    usable = torch.zeros(40, dtype=torch.bool)
    usable[39] = True
    kept = population[[1, 5, 3, 7]]
    found = genetic_step(population, losses, usable, seeded(0), crossover=1.0, mutation=0.0)
    assert torch.equal(found[:4], kept)
    generator = seeded(0)
    first, second, cuts = (torch.randint(high, (2,), generator=generator) for high in (4, 4, 3))
    for pair in range(2):
        mother, father, cut = kept[first[pair]], kept[second[pair]], int(cuts[pair]) + 1
        assert torch.equal(found[4 + pair], torch.cat([mother[:cut], father[cut:]]))
        assert torch.equal(found[6 + pair], torch.cat([father[:cut], mother[cut:]]))
    mutated = genetic_step(population, losses, usable, seeded(0), crossover=0.0, mutation=1.0)
    assert torch.equal(mutated[:4], kept) and ((mutated[4:] == 39).sum(1) == 1).all()


def test_nearest_tokens_have_the_highest_cosine(encoder):
    table = embedding_table(encoder.model).detach()
    usable = torch.ones(len(table), dtype=torch.bool)
    usable[7] = False
    assert nearest_tokens(table[[5, 7, 9]] * 3, table, usable).tolist()[::2] == [5, 9]
    assert nearest_tokens(table[[7]], table, usable).item() != 7


def test_vectors_stay_within_their_norm():
    goal = torch.tensor([[3.0, 4.0], [0.1, 0.0]])
    steps = learn_vectors(torch.zeros(2, 2), lambda vectors: (vectors - goal).square().sum(), 300, 0.05, 1.0)
    found, losses = zip(*steps, strict=True)
    found = found[-1]
    assert torch.allclose(found, torch.tensor([[0.6, 0.8], [0.1, 0.0]]), atol=0.15) and losses[-1] < losses[0]
    assert found.norm(dim=1).max() <= 1 + 1e-6 and torch.equal(limit_norms(goal, None), goal)


def test_a_vocabulary_offers_tokens_that_survive_and_are_not_forbidden(encoder):
    vocabulary = Vocabulary(encoder, refused=lambda text: False)
    usable = vocabulary.usable.nonzero()[:, 0].tolist()
    texts = vocabulary.texts([[token] for token in usable])
    assert not set(usable) & set(encoder.tokenizer.all_special_ids) and vocabulary.encode(texts) == [
        [token] for token in usable
    ]
    ids = vocabulary.random(5, seeded(0)).tolist()
    assert vocabulary.surviving([ids]) == vocabulary.texts([ids])
    forbidden = Vocabulary(encoder, forbidden=[texts[0].upper()])
    assert not forbidden.usable[usable[0]] and not forbidden.allowed(f"x {texts[0]} y") and forbidden.allowed("qqq")
    with pytest.raises(UserError, match="no token is left"):
        Vocabulary(encoder, forbidden=texts)
    with pytest.raises(UserError, match="no prompt of 5 random tokens"):
        Vocabulary(encoder, refused=lambda text: True).random(5, seeded(0))


@pytest.mark.parametrize(("head", "tail"), [([], []), ([], [3, 4]), ([3, 4], []), ([3] * 90, []), ([], [3] * 90)])
def test_rows_are_the_tokenizers(encoder, head, tail):
    vocabulary = Vocabulary(encoder)
    ids = torch.tensor([5, 6])
    row, slots = vocabulary.rows(ids, head, tail)
    assert row[slots].tolist() == [5, 6] and len(row) == encoder.length
    assert row[0] == encoder.tokenizer.bos_token_id and encoder.tokenizer.eos_token_id in row
    text = vocabulary.texts([vocabulary.random(4, seeded(2)).tolist()])
    made, _ = vocabulary.rows(torch.tensor(vocabulary.encode(text)[0]))
    assert torch.equal(made, encoder.tokenize(text)[0])
