"""The dtype that is asked for is the one that is loaded, in every release of transformers and diffusers."""

from des.models import loading
from des.models.loading import check_dtype, dtype_option
from des.models.pipelines import open_pipeline
from des.utils.errors import UserError

import pytest
import torch


@pytest.mark.parametrize(
    ("library", "installed", "name"),
    [
        ("transformers", "4.55.4", "torch_dtype"),
        ("transformers", "4.56.0", "dtype"),
        ("transformers", "5.24.0", "dtype"),
        ("diffusers", "0.39.0", "torch_dtype"),
        ("diffusers", "0.40.0", "dtype"),
    ],
)
def test_the_options_name_in_each_release(monkeypatch, library, installed, name):
    monkeypatch.setattr("importlib.metadata.version", {library: installed}.get)
    assert dtype_option(library, torch.bfloat16) == {name: torch.bfloat16}


def test_every_part_of_a_pipeline_has_the_dtype_asked_for(tiny_pipeline):
    pipe = open_pipeline(str(tiny_pipeline), torch.bfloat16)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}


@pytest.mark.parametrize("ignored_by", ["transformers", "diffusers"])
def test_a_dtype_that_a_library_ignores_is_an_error(tiny_pipeline, monkeypatch, ignored_by):
    """As releases did that read another name."""
    option = loading.dtype_option

    def ignored(library: str, dtype: torch.dtype) -> dict:
        return {} if library == ignored_by else option(library, dtype)

    monkeypatch.setattr("des.models.loading.dtype_option", ignored)
    monkeypatch.setattr("des.models.pipelines.dtype_option", ignored)
    with pytest.raises(UserError, match=r"was loaded in torch\.float32 instead of torch\.bfloat16"):
        open_pipeline(str(tiny_pipeline), torch.bfloat16)


def test_values_that_are_no_modules_are_skipped():
    check_dtype({"scheduler": object(), "safety_checker": None}, torch.float16, "a pipeline")
