"""What the attacks minimise, draw and truncate: each objective against an independent computation."""

from des.attacks.denoising import P4D, UnlearnDiffAtk
from des.attacks.judging import Draws
from des.attacks.objectives import Denoiser, TextGoals, concept_direction, pooled, pooled_cosine, sequence_distance
from des.models.pipelines import open_pipeline, text_encoder
from des.search.soft import embedding_table
from des.search.tokens import Vocabulary, genetic_search, seeded
from des.utils.errors import UserError

import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity


@pytest.fixture(scope="module")
def pipe(tiny_pipeline):
    return open_pipeline(str(tiny_pipeline), torch.float32)


def test_mmas_goal_is_the_cosine_of_pooled_outputs_and_its_gradient(pipe):
    encoder = text_encoder(pipe, 1)
    goal = pooled(encoder, encoder.tokenize(["a red house", "a boat"])).detach()
    goals = TextGoals([encoder], [goal], pooled_cosine)
    texts = ["two dogs", "a red house"]
    output = encoder.model(input_ids=encoder.tokenize(texts)).pooler_output
    expected = 1 - cosine_similarity(output, goal[[1, 0]])
    assert torch.allclose(goals.losses(texts, [1, 0]), expected, atol=1e-5) and goals.losses(["a red house"], [0]).abs() < 1e-5
    found, table = goals.gradient(texts, slice(1, 3)), embedding_table(encoder.model).detach()
    inputs = table[encoder.tokenize(texts)].requires_grad_()
    hook = encoder.model.get_input_embeddings().register_forward_hook(lambda *_: inputs)
    (1 - cosine_similarity(encoder.model(input_ids=encoder.tokenize(texts)).pooler_output, goal)).sum().backward()
    hook.remove()
    raw = inputs.grad[:, 1:3] @ table.T
    assert torch.allclose(found, raw / raw.norm(dim=-1, keepdim=True), atol=1e-4)


def test_ring_a_bells_goal_is_the_target_plus_the_concepts_direction(pipe):
    encoder = text_encoder(pipe, 1)
    pairs = [("a red house", "a house"), ("two red dogs", "two dogs")]
    embed = lambda text: next(encoder.encode([text], 1))[0]  # noqa: E731
    expected = torch.stack([embed(a) - embed(b) for a, b in pairs]).mean(0)
    direction = concept_direction(encoder, pairs)
    assert torch.allclose(direction, expected, atol=1e-5)
    goal = embed("a boat") + 3 * direction
    goals = TextGoals([encoder], [goal[None]], sequence_distance)
    assert torch.allclose(goals.losses(["two dogs"], [0]), (embed("two dogs") - goal).square().sum(), rtol=1e-4)
    found = genetic_search(goals, Vocabulary(encoder), 3, 6, 8, 0.5, 0.25, [seeded(0)])
    start = genetic_search(goals, Vocabulary(encoder), 3, 0, 8, 0.5, 0.25, [seeded(0)])
    assert found[0].loss <= start[0].loss and torch.allclose(
        goals.losses([found[0].text], [0]), torch.tensor(found[0].loss), rtol=1e-4
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_denoisers_loss_is_the_error_of_what_the_model_predicts(pipe, prediction_type, monkeypatch):
    denoiser = Denoiser(pipe)
    denoiser.scheduler.register_to_config(prediction_type=prediction_type)
    clean, noise = (torch.randn(2, 4, 8, 8, generator=seeded(i)) for i in (1, 2))
    times, embeddings = torch.tensor([10, 900]), next(text_encoder(pipe, 1).encode(["a boat", "a dog"], 2)).clone()
    alphas = denoiser.scheduler.alphas_cumprod[times].reshape(2, 1, 1, 1)
    noisy = alphas.sqrt() * clean + (1 - alphas).sqrt() * noise
    target = noise if prediction_type == "epsilon" else alphas.sqrt() * noise - (1 - alphas).sqrt() * clean
    with torch.no_grad():
        expected = (pipe.unet(noisy, times, embeddings).sample - target).square().mean((1, 2, 3))
        assert torch.allclose(denoiser.loss(clean, noise, times, embeddings), expected, rtol=1e-4)


class OneCell:
    """What UDA and P4D read of a cell, for one pipeline and one row."""

    def __init__(self, pipe):
        self.pipe = self.original = pipe
        self.starts = self.targets = ["a boat on a lake"]

    def vocabulary(self, encoder):
        return Vocabulary(encoder)


@pytest.mark.parametrize("place", ["before", "after"])
def test_udas_loss_is_the_denoisers_under_the_drawn_tokens_beside_the_prompt(pipe, place):
    attack = UnlearnDiffAtk(OneCell(pipe), 2, 1, 4, 0.01, 0.1, place, 0)
    assert attack.timesteps == [125, 375, 625, 875]
    clean = torch.randn(1, 4, 8, 8, generator=seeded(5))

    class Fixed:
        tokens = attack.vocabulary.usable.nonzero()[:, 0]

        def draw(self, generators):
            return torch.eye(len(self.tokens))[None, [4, 7]], self.tokens[None, [4, 7]]

    found = attack.losses(Fixed(), [0], clean, 300, [seeded(9)])
    parts = [Fixed.tokens[[4, 7]].tolist(), attack.vocabulary.encode(["a boat on a lake"])[0]]
    ids = sum(parts if place == "before" else parts[::-1], attack.vocabulary.before)
    row = attack.encoder.tokenize([""])
    row[0, : len(ids)] = torch.tensor(ids)
    noise = torch.randn(clean.shape, generator=seeded(9))
    expected = attack.denoiser.loss(clean, noise, torch.tensor([300]), attack.encoder(row))
    assert torch.allclose(found, expected, rtol=1e-4)


def test_p4ds_loss_compares_both_denoisers_under_the_nearest_tokens(pipe):
    attack = P4D(OneCell(pipe), 2, 1, 1, 0.1, 0.1, 0)
    clean = torch.randn(1, 4, 8, 8, generator=seeded(5))
    ids = attack.vocabulary.usable.nonzero()[:, 0][[4, 7]]
    soft = (attack.table[ids] * 1.7)[None].clone().requires_grad_()  # another norm, the same direction
    goals = next(attack.reference.encode(["a boat on a lake"], 1)).clone()
    found, nearest = attack.losses(soft, goals, clean, [seeded(9)])
    assert torch.equal(nearest, ids[None])
    generator = seeded(9)
    noise = torch.randn(clean.shape, generator=generator)
    times = torch.randint(1000, (1,), generator=generator)
    noisy = attack.denoiser.noisy(clean, noise, times)
    under = attack.encoder(attack.encoder.tokenize(attack.vocabulary.texts(nearest.tolist())))
    with torch.no_grad():
        difference = pipe.unet(noisy, times, under).sample - pipe.unet(noisy, times, goals).sample
    assert torch.allclose(found, difference.square().mean((1, 2, 3)), rtol=1e-3)
    found.sum().backward()
    assert soft.grad.abs().max() > 0


def test_a_candidate_that_does_not_survive_is_not_drawn(pipe):
    encoder = text_encoder(pipe, 1)
    vocabulary = Vocabulary(encoder, forbidden=["boat"])

    class NeverAsked:
        def hits(self, rows, texts):
            assert list(rows) == [] == list(texts)
            return []

    draws = Draws(NeverAsked(), [7])
    assert not draws.add(vocabulary, torch.tensor([[encoder.tokenizer.bos_token_id, 5]]), ["x"], [0.1], 4)
    forbidden = torch.tensor(vocabulary.encode(["boat"]))
    assert not draws.add(vocabulary, forbidden, ["boat"], [0.1], 8) and draws.found[0].hits == [] and draws.found[0].tried == 8


def test_a_text_that_is_never_drawn_is_not_written_as_found(pipe):
    """The searched tokens alone are allowed, and refused only beside the prompt."""
    vocabulary, verdicts = Vocabulary(text_encoder(pipe, 1)), iter([[False], [None]])

    class Refusing:
        def hits(self, rows, texts):
            return next(verdicts)

    draws, ids = Draws(Refusing(), [7]), torch.tensor(vocabulary.encode(["house"]))
    for text in ("house a boat", "house a child"):
        assert not draws.add(vocabulary, ids, [text], [0.1], 4)
    assert draws.found[0].prompt == "house a boat" and draws.found[0].hits == [False]


def test_tokens_after_a_long_prompt_are_read(pipe):
    cell = OneCell(pipe)
    cell.starts = cell.targets = ["a red boat on a blue lake " * 20]
    attack = UnlearnDiffAtk(cell, 2, 1, 1, 0.01, 0.1, "after", 0)
    text, ids = attack.text("house house", 0), attack.vocabulary.encode(["house house"])[0]
    row, slots = attack.vocabulary.rows(torch.tensor(ids), attack.vocabulary.encode([attack.start(0)])[0])
    assert row.tolist() == attack.encoder.tokenize([text])[0].tolist() and row[slots].tolist() == ids
    assert text.startswith("a red boat on a blue lake a red")


def test_images_of_different_sizes_are_not_mixed(pipe):
    images = [Image.new("RGB", (16, 16)), Image.new("RGB", (24, 16))]
    with pytest.raises(UserError, match="different image sizes"):
        Denoiser(pipe).latents(images)
    assert Denoiser(pipe).latents(images[1:]).shape == (1, 4, 8, 12)
