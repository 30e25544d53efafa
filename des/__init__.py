"""The shared code of DES, Distorting Embedding Space (arXiv 2501.18877)."""

import logging
import warnings

# What importing torchao, which transformers and diffusers do on their own, says about the internals of torch.
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant" not in record.getMessage())
logging.getLogger("diffusers.quantizers").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
