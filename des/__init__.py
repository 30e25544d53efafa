"""DES, Distorting Embedding Space (arXiv 2501.18877): text encoders of diffusion models without an unwanted concept.

`des.protect`, `des.train` and `des.score` are the Python interface; `docs/python.md` shows their use. They import torch and
diffusers when they are first used.
"""

import logging
import warnings
from typing import Any

from des.utils.errors import UserError

__version__ = "1.0.0"
__all__ = ["UserError", "protect", "score", "train"]

# What importing torchao, which transformers and diffusers do on their own, says about the internals of torch.
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant" not in record.getMessage())
logging.getLogger("diffusers.quantizers").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")


def __getattr__(name: str) -> Any:
    if name not in ("protect", "score", "train"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from des import api

    return getattr(api, name)
