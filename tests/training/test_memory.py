"""What a plan says against what real training steps on small models keep, and against known sizes of the large ones."""

import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

from des.models.activations import checkpoint_blocks, use_lean_activations
from des.models.encoders import not_padding
from des.training import losses
from des.training.memory import Plan, describe, make_plan
from des.training.optimizers import make_optimizer
from des.utils.choices import OPTIMIZERS
from des.utils.errors import UserError

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel, T5Config, T5EncoderModel

CLIP_L = CLIPTextConfig(
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)  # fmt: skip
T5_XXL = T5Config(
    vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)
CLIP = CLIPTextConfig(
    vocab_size=99, hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, projection_dim=32
)  # fmt: skip
T5 = T5Config(  # the CPU's fused attention takes no dropout
    vocab_size=99, d_model=64, d_kv=16, d_ff=160, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu", dropout_rate=0.0
)
TOKENS, BATCH = 32, 8
GIVEN = {"pairs": 1000, "num_epochs": 3, "codebook_rows": 500, "codebook_itemsize": 4, "optimizer": "adamw", "autocast": None}
GIVEN |= {"gradient_checkpointing": False, "tokens": TOKENS, "batch_size": BATCH}


def last(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).last_hidden_state


def penultimate(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, output_hidden_states=True).hidden_states[-2]


def masked(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=not_padding(ids, 0)).last_hidden_state


def build(kind: type[PreTrainedModel], config, dtype: torch.dtype = torch.float32, device: str = "meta") -> PreTrainedModel:
    with torch.device(device):
        model = kind(config).to(dtype).train()
    use_lean_activations(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("relative_attention_bias" not in name or device == "meta")  # nor a mask with gradients
    return model


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of each storage by its address."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def saving(into: list[Tensor]) -> AbstractContextManager:
    """Collect every tensor that autograd saves."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: into.append(tensor) or tensor, lambda tensor: tensor)


def kept(model: PreTrainedModel, read: Callable, autocast: torch.dtype | None = None, block: nn.Module | None = None) -> int:
    """Bytes that a real step on the CPU keeps besides the weights, and those that running `block` alone and in eval mode, which is without checkpointing, adds."""
    ids = torch.randint(1, 99, (2 * BATCH + 1, TOKENS))
    ids[:, TOKENS // 2 :] = 0
    saved: list[Tensor] = []
    with saving(saved):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            embeddings = read(model, ids)
        unsafe, safe, concept_now = embeddings.split([BATCH, BATCH, 1])
        concept = losses.Concept(torch.randn(safe.shape[1:]), torch.randn(safe.shape[1:]), alpha=1.0)
        target, original = concept.target(torch.randn(unsafe.shape)), torch.randn(safe.shape)
        losses.total(unsafe, safe, concept_now, target, original, concept)
        once = storages([*saved, embeddings, target, original])
    if block is not None:
        states = torch.randn(len(ids), TOKENS, model.config.hidden_size, requires_grad=True)
        inner: list[Tensor] = []
        with saving(inner):
            block.eval()(states, attention_mask=None, is_causal=True)
        once |= {address: size for address, size in storages(inner).items() if address != states.data_ptr()}
    weights = storages([*model.parameters(), *model.buffers()])
    return sum(size for address, size in once.items() if address not in weights)


@pytest.mark.parametrize(
    ("kind", "config", "dtype", "tokens", "parameters"),
    [
        (CLIPTextModel, CLIP_L, torch.float32, 77, 123_060_480),
        (CLIPTextModelWithProjection, CLIP_L, torch.float32, 77, 123_060_480 + 768 * CLIP_L.projection_dim),
        (T5EncoderModel, T5_XXL, torch.bfloat16, 512, 4_762_310_656),
    ],
)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_real_sizes_without_memory(kind, config, dtype, tokens, parameters, autocast, gradient_checkpointing):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build(kind, config, dtype)
    if gradient_checkpointing:
        checkpoint_blocks(model)
    given = GIVEN | {"tokens": tokens, "autocast": autocast, "gradient_checkpointing": gradient_checkpointing}
    plan = make_plan(model, last, **given)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB
    assert all(parameter.is_meta for parameter in model.parameters())
    assert plan.parameters == parameters
    assert plan.gradients == parameters * dtype.itemsize
    assert plan.weights == plan.gradients + sum(buffer.nbytes for buffer in model.buffers())
    assert plan.codebook_on_disk == 500 * tokens * config.hidden_size * 4
    assert plan.steps == 3 * 125


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "config", "read"),
    [
        (CLIPTextModel, CLIP, last),
        (CLIPTextModel, CLIP, penultimate),
        (CLIPTextModelWithProjection, CLIP, last),
        (T5EncoderModel, T5, last),
        (T5EncoderModel, T5, masked),
    ],
)
def test_activations_are_those_that_a_real_step_keeps(kind, config, read, dtype):
    plan = make_plan(build(kind, config, dtype), read, **GIVEN)
    assert plan.activations == pytest.approx(kept(build(kind, config, dtype, "cpu"), read), rel=0.01)


def test_activations_under_autocast():
    plan = make_plan(build(CLIPTextModel, CLIP), last, **GIVEN | {"autocast": torch.bfloat16})
    assert plan.activations == pytest.approx(kept(build(CLIPTextModel, CLIP, device="cpu"), last, torch.bfloat16), rel=0.01)
    assert not torch.is_autocast_enabled("cuda")


def test_checkpointing_keeps_the_inputs_and_one_block():
    planned, real = build(CLIPTextModel, CLIP), build(CLIPTextModel, CLIP, device="cpu")
    without = make_plan(planned, last, **GIVEN).activations
    checkpoint_blocks(real)
    checkpoint_blocks(planned)
    plan = make_plan(planned, last, **GIVEN | {"gradient_checkpointing": True})
    assert plan.activations == pytest.approx(kept(real, last, block=real.encoder.layers[0]), rel=0.01)
    assert plan.activations < 0.6 * without
    assert all(layer.gradient_checkpointing for layer in planned.encoder.layers)


def test_activations_grow_with_the_batch_of_one_process():
    def activations(**given) -> int:
        return make_plan(build(CLIPTextModel, CLIP), last, **GIVEN | given).activations

    assert activations(batch_size=16) == pytest.approx(activations(batch_size=8) * 33 / 17, rel=0.01)
    assert activations(batch_size=16, processes=2) == activations(batch_size=15, processes=2) == activations(batch_size=8)
    assert activations(batch_size=64, pairs=8) == activations(batch_size=8)


def test_sharding_divides_all_but_activations():
    alone = make_plan(build(CLIPTextModel, CLIP), last, **GIVEN)
    both = GIVEN | {"batch_size": 2 * BATCH, "processes": 2}
    sharded = make_plan(build(CLIPTextModel, CLIP), last, **both, sharded=True)
    parts = "weights", "gradients", "optimizer"
    assert [2 * getattr(sharded, part) for part in parts] == [getattr(alone, part) for part in parts]
    replicated = make_plan(build(CLIPTextModel, CLIP), last, **both)
    assert replicated == replace(alone, steps=replicated.steps, processes=2)


def test_tied_weights_count_once_and_frozen_ones_take_weights_only():
    model = build(T5EncoderModel, T5)
    count = sum(parameter.numel() for name, parameter in model.named_parameters() if name != "encoder.embed_tokens.weight")
    assert make_plan(model, last, **GIVEN).parameters == count
    weights = make_plan(model, last, **GIVEN).weights
    model.shared.requires_grad_(False)
    plan = make_plan(model, last, **GIVEN)
    assert (plan.weights, plan.parameters, plan.gradients) == (weights, count - 99 * 64, 4 * (count - 99 * 64))


def flat(state: object) -> Iterator[Tensor]:
    """The plain tensors of an optimizer's state; torchao's quantized ones consist of several."""
    if hasattr(state, "tensor_attrs"):
        yield from (getattr(state, name) for name in state.tensor_attrs)
    else:
        yield state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_is_the_real_one(name):
    dtype = torch.float32 if name == "adamw" else torch.bfloat16
    model = nn.Sequential(nn.Embedding(512, 256), nn.Linear(256, 10)).to(dtype)  # quantized, too small, too small
    optimizer = make_optimizer(name, model.parameters(), 1e-3)
    model(torch.arange(512)).square().mean().backward()
    optimizer.step()
    real = sum(tensor.nbytes for state in optimizer.state.values() for value in state.values() for tensor in flat(value))
    plan = make_plan(model.to("meta"), lambda model, ids: model(ids), **GIVEN | {"optimizer": name})
    assert plan.optimizer == real
    assert plan.optimizer < plan.weights * 1.1 if name == "adamw8bit" else plan.optimizer > plan.weights * 1.9


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="sgd is not a known optimizer; choose one of adamw, "):
        make_plan(build(CLIPTextModel, CLIP), last, **GIVEN | {"optimizer": "sgd"})


PLAN = Plan(
    parameters=4_762_310_656, weights=9_520_000_000, gradients=9_520_000_000, optimizer=9_670_000_000, activations=2_990_000_000,
    codebook_on_disk=123_450_000_000, steps=2500, processes=1, sharded=False,
)  # fmt: skip


def test_describe_names_the_cards_and_what_to_try():
    text = describe(PLAN)
    assert PLAN.total == 31_700_000_000
    assert "4,762,310,656 parameters to train in 2,500 steps; the codebook takes 123.45 GB of disk" in text
    assert "24 GB no, 40 GB yes, 80 GB yes" in text and "1.5 GB for CUDA's context" in text
    for remedy in ("gradient checkpointing", "smaller batch", "adamw8bit", "sharding"):
        assert remedy in text
    table = dict(line.split() for line in text.splitlines() if line.startswith("  "))
    assert table == {"weights": "9.52", "gradients": "9.52", "optimizer": "9.67", "activations": "2.99", "total": "31.70"}


def test_describe_keeps_the_margin_and_tells_of_devices():
    assert "24 GB no, 40 GB no, 80 GB yes" in describe(replace(PLAN, activations=10_000_000_000))  # 38.71 + 1.5
    small = describe(replace(PLAN, weights=0, gradients=0, processes=4, sharded=True))
    assert "24 GB yes, 40 GB yes, 80 GB yes" in small and "to reduce this" not in small
    assert "on each of 4 devices, sharded" in small
    assert "replicated" in describe(replace(PLAN, processes=4))


def test_a_torch_that_cannot_count_says_so(monkeypatch):
    monkeypatch.setattr("des.training.memory.release", lambda library: (2, 9, 1))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r"cannot compute a GPU's memory .* install torch 2\.10 or newer"):
        make_plan(build(CLIPTextModel, CLIP), last, **GIVEN)
