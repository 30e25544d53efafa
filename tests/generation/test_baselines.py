"""Files of other defences fit the UNet and change it, or nothing changes and one sentence says why."""

import os

from des.generation.unet_defences import _product, load_unet_weights, merge_spm
from des.models.checkpoints import fingerprint
from des.utils.errors import UserError
from des.utils.files import sha256_file

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

KEY = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
LAYERS = (KEY.removesuffix(".weight"), "down_blocks.1.attentions.0.proj_in")  # a Linear and a Conv2d
LINEAR, CONV = ("lora_unet_" + path.replace(".", "_") for path in LAYERS)


@pytest.fixture
def make(tiny_pipeline):
    return lambda: UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet")


@pytest.fixture
def unet(make):
    return make()


def copied(state):
    """Tensors of their own memory, as safetensors wants them."""
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def saved(state, path, nest=None):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({nest: state} if nest else state, path)
    return path


def adapters(unet, rank=1, alpha=0.5):
    """An SPM file's tensors for one Linear and one Conv2d."""
    torch.manual_seed(0)
    state = {}
    for name, path in zip((LINEAR, CONV), LAYERS, strict=True):
        out, inner, *kernel = unet.get_submodule(path).weight.shape
        state[f"{name}.lora_down.weight"] = torch.randn(rank, inner, *kernel)
        state[f"{name}.lora_up.weight"] = torch.randn(out, rank, *[1] * len(kernel))
        state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def refuses(function, unet, path, says):
    before = fingerprint(unet)
    with pytest.raises(UserError, match=says) as error:
        function(unet, path)
    assert "\n" not in str(error.value)
    assert fingerprint(unet) == before


@pytest.mark.parametrize(
    ("file", "nest"),
    [("w.safetensors", None), ("w.pt", None), ("w.pt", "model_state_dict"), ("w.pt", "state_dict"), ("w.pt", "unet")],
)
@pytest.mark.parametrize("whole", [True, False])
def test_what_is_in_the_file_is_replaced_and_the_rest_stays(unet, tmp_path, file, nest, whole):
    before = copied(unet.state_dict())
    given = {name: tensor.clone() for name, tensor in before.items() if whole or name == KEY} | {KEY: before[KEY] + 0.5}
    path = saved(given, tmp_path / file, nest)
    applied = load_unet_weights(unet, path)
    assert applied == {"file": str(path), "sha256": sha256_file(path), "tensors": len(before) if whole else 1}
    assert all(torch.equal(tensor, (before | given)[name]) for name, tensor in unet.state_dict().items())


def test_weights_are_cast_to_the_unets_dtype(unet, tmp_path):
    given = {KEY: torch.full_like(unet.state_dict()[KEY], 1 / 3)}
    load_unet_weights(unet.half(), saved(given, tmp_path / "w.safetensors"))
    assert {tensor.dtype for tensor in unet.state_dict().values()} == {torch.float16}
    assert torch.equal(unet.state_dict()[KEY], given[KEY].half())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda own: {KEY: own[KEY]}, "does not change the UNet"),
        (lambda own: own, "does not change the UNet"),
        (lambda own: {KEY: own[KEY] + 1, "extra.weight": own[KEY]}, "1 of its 2 tensors are unknown, `extra.weight` first"),
        (lambda own: {"model.diffusion_model.out.2.bias": own[KEY]}, "CompVis names, which diffusers' single-file loader"),
        (lambda own: {"alphas_cumprod": own[KEY], "model.diffusion_model.out.2.bias": own[KEY]}, "CompVis names"),
        (lambda own: {KEY: own[KEY][:-1] + 1}, r"`down_blocks.*` has shape \(15, 32\) in the file and \(16, 32\) in the model"),
        (lambda own: {KEY: own[KEY] * torch.nan}, "NaN or infinite"),
        (lambda own: {KEY: own[KEY] + torch.inf}, "NaN or infinite"),
        (lambda own: {KEY: own[KEY] + 1, "step": 3}, "of tensors"),
        (lambda own: {}, "of tensors"),
        (lambda own: {"unet": {}}, "of tensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused(unet, tmp_path, change, says):
    refuses(load_unet_weights, unet, saved(change(copied(unet.state_dict())), tmp_path / "w.pt"), says)


@pytest.mark.parametrize("function", [load_unet_weights, merge_spm])
@pytest.mark.parametrize("file", ["w.pt", "w.safetensors"])
def test_damaged_and_missing_files_are_refused(unet, tmp_path, function, file):
    state = adapters(unet) if function is merge_spm else copied(unet.state_dict())
    path = saved(state, tmp_path / file)
    whole = path.read_bytes()
    for length in (0, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refuses(function, unet, path, "not a complete checkpoint")
    refuses(function, unet, tmp_path / f"missing-{file}", "does not exist")


class Code:
    """An object whose unpickling would run code: it would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder),))


@pytest.mark.parametrize("function", [load_unet_weights, merge_spm])
def test_code_is_refused_and_does_not_run(unet, tmp_path, function):
    refuses(function, unet, saved({KEY: Code(tmp_path / "it-ran")}, tmp_path / "w.pt"), "can be code")
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("function", [load_unet_weights, merge_spm])
def test_weights_that_overflow_the_unets_dtype_are_refused(unet, tmp_path, function):
    state = adapters(unet, alpha=1e6) if function is merge_spm else {KEY: unet.state_dict()[KEY] + 1e6}
    refuses(function, unet.half(), saved(state, tmp_path / "w.pt"), "does not fit into torch.float16")


@pytest.mark.parametrize("function", [load_unet_weights, merge_spm])
def test_a_load_that_does_not_arrive_is_noticed(unet, tmp_path, monkeypatch, function):
    state = adapters(unet) if function is merge_spm else {KEY: unet.state_dict()[KEY] + 1}
    monkeypatch.setattr(unet, "load_state_dict", lambda *args, **options: None)
    refuses(function, unet, saved(state, tmp_path / "w.pt"), "were not loaded")


@pytest.mark.parametrize("rank", [1, 3])
def test_merged_spm_draws_what_layers_with_adapters_draw(make, tmp_path, rank):
    plain, wrapped, merged = make(), make(), make()
    state = adapters(plain, rank)
    for name, path in zip((LINEAR, CONV), LAYERS, strict=True):
        layer = wrapped.get_submodule(path)
        down, up = (state[f"{name}.lora_{part}.weight"] for part in ("down", "up"))
        apply = nn.functional.conv2d if isinstance(layer, nn.Conv2d) else nn.functional.linear
        layer.register_forward_hook(lambda _, x, out, f=apply, d=down, u=up: out + f(f(x[0], d), u) * 0.5 / rank)
    assert [type(plain.get_submodule(path)) for path in LAYERS] == [nn.Linear, nn.Conv2d]
    applied = merge_spm(merged, saved(state, tmp_path / "spm.safetensors"))
    assert applied == {
        "file": str(tmp_path / "spm.safetensors"), "sha256": sha256_file(tmp_path / "spm.safetensors"), "tensors": 2,
    }  # fmt: skip
    inputs = torch.randn(2, 4, 8, 8), 5, torch.randn(2, 77, 32)
    with torch.no_grad():
        before, expected, got = (each(*inputs).sample for each in (plain, wrapped, merged))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert (got - before).abs().max() > 1e-3
    touched = {f"{path}.weight" for path in LAYERS}
    own = plain.state_dict()
    assert {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, own[name])} == touched


def test_spm_is_summed_in_fp32_and_cast_once(unet, tmp_path):
    state = adapters(unet.half(), rank=3)
    weight = unet.state_dict()[KEY].clone()
    merge_spm(unet, saved(state, tmp_path / "spm.safetensors"))
    down, up = (state[f"{LINEAR}.lora_{part}.weight"] for part in ("down", "up"))
    expected = (weight.float() + (up @ down) * (0.5 / 3)).half()
    assert torch.equal(unet.state_dict()[KEY], expected)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [((1, 1), 1, 0), ((3, 3), 1, 1), ((3, 3), 2, 1), ((1, 3), 1, (0, 1))])
def test_a_merged_convolution_is_up_after_down(kernel, stride, padding):
    torch.manual_seed(0)
    down, up, x = torch.randn(2, 3, *kernel), torch.randn(5, 2, 1, 1), torch.randn(1, 3, 6, 6)
    merged = _product(down, up, torch.tensor(1.0), torch.empty(5, 3, *kernel), "it")
    conv = nn.functional.conv2d
    expected = conv(conv(x, down, stride=stride, padding=padding), up) * 1.0 / 2
    torch.testing.assert_close(conv(x, merged, stride=stride, padding=padding), expected, rtol=0, atol=1e-5)


DOWN, UP, ALPHA = (f"{LINEAR}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha"))


def renamed(state, old, new):
    return {name.replace(old, new): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        *[(lambda state, part=part: {k: v for k, v in state.items() if k != part}, "is missing") for part in (DOWN, UP, ALPHA)],
        (lambda state: state | {"extra": torch.ones(1)}, "`extra`"),
        (lambda state: state | {f"{LINEAR}.lora_mid.weight": torch.ones(1)}, f"`{LINEAR}.lora_mid.weight`"),
        (lambda state: renamed(state, "lora_unet_", "lora_te_"), "no layer for the adapter `lora_te_"),
        (lambda state: renamed(state, CONV, "lora_unet_conv_in"), "no layer for the adapter `lora_unet_conv_in`"),
        (
            lambda state: renamed(state, "attentions_0_proj_in", "resnets_0_conv1"),
            "no layer for the adapter `lora_unet_.*conv1`",
        ),
        (lambda state: renamed(state, "proj_in", "norm"), "no layer for the adapter `lora_unet_.*_norm`"),  # a GroupNorm
        (lambda state: state | {DOWN: torch.ones(1, 31)}, "does not fit its layer"),
        (lambda state: state | {DOWN: torch.ones(2, 32)}, "does not fit its layer"),  # rank 2 beside rank 1
        (lambda state: state | {UP: torch.ones(16, 2)}, "does not fit its layer"),
        (lambda state: state | {UP: torch.ones(15, 1)}, "does not fit its layer"),
        (lambda state: state | {UP: torch.ones(16)}, "does not fit its layer"),
        (lambda state: state | {DOWN: torch.ones(())}, "does not fit its layer"),
        (lambda state: state | {DOWN: torch.ones(0, 32), UP: torch.ones(16, 0)}, "does not fit its layer"),
        (lambda state: state | {ALPHA: torch.ones(2)}, "does not fit its layer"),
        (lambda state: state | {f"{CONV}.lora_up.weight": torch.ones(16, 1, 3, 3)}, "does not fit its layer"),
        (lambda state: state | {ALPHA: torch.tensor(torch.nan)}, "NaN or infinite"),
        (lambda state: {name: tensor * 0 if "alpha" in name else tensor for name, tensor in state.items()}, "does not change"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(unet, tmp_path, change, says):
    refuses(merge_spm, unet, saved(copied(change(adapters(unet))), tmp_path / "spm.safetensors"), says)


def test_an_empty_file_of_adapters_is_refused(unet, tmp_path):
    refuses(merge_spm, unet, saved({}, tmp_path / "spm.safetensors"), "of tensors")
