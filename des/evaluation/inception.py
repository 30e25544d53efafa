"""The Inception-v3 of FID, and the image preprocessing of the three common FID variants.

All three use the same weights (pt_inception-2015-12-05-6726825d, as pytorch-fid and torch-fidelity do) on inputs [3, 299, 299].
"""

import io
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path

from des.models.loading import loading, read_state
from des.utils.errors import UserError

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision.transforms.functional import pil_to_tensor

SIZE = 299
HASH = "6726825d"  # of the published weights file


def paper(image: Image.Image) -> Tensor:
    """text2image-benchmark's input: the centre square, PIL bicubic in uint8, 2x/255 - 1."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return pil_to_tensor(square).float() * 2 / 255 - 1


def torch_fidelity(image: Image.Image) -> Tensor:
    """torch-fidelity's input: TensorFlow 1's bilinear resize without antialiasing, (x - 128) / 128."""
    pixels = pil_to_tensor(image).float()[None]
    return (interpolate_bilinear_2d_like_tensorflow1x(pixels, size=(SIZE, SIZE), align_corners=False)[0] - 128) / 128


def clean_fid(image: Image.Image) -> Tensor:
    """clean-fid's input: PIL bicubic of each channel in float, clipped to 0..255, (x - 128) / 128."""
    channels = [channel.convert("F").resize((SIZE, SIZE), Image.Resampling.BICUBIC) for channel in image.split()]
    return (torch.from_numpy(np.stack(channels)).clamp(0, 255) - 128) / 128


VARIANTS: dict[str, Callable[[Image.Image], Tensor]] = {
    "paper": paper,
    "torch-fidelity": torch_fidelity,
    "clean-fid": clean_fid,
}
"""Preprocessing functions by name. Each turns an RGB image of any size into the float32 input [3, 299, 299]."""


class Inception(nn.Module):
    """torch-fidelity's Inception-v3 with a given state dict, up to its pooled features; raises as `load_state_dict` does."""

    def __init__(self, state: Mapping[str, Tensor]):
        super().__init__()
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)  # tensors only, since the class unpickles its file without restriction
        buffer.seek(0)
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=buffer)
        del self.network.fc
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Features [n, 2048] of prepared images [n, 3, 299, 299], float32 without TF32, whose rounding would change the FID."""
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            for layer in self.network.children():  # the layers are registered in the order of execution
                x = layer(x)
        return x.flatten(1)


def load_inception(source: Path | None, device: torch.device) -> Inception:
    """Load the network from a weights file, or from the published one, which is downloaded once into torch.hub's folder.

    Raises UserError if the download fails or the file is not a state dict of this network. No code in the file is run.
    """
    path = source or _published()
    state = read_state(path, f"Inception-v3 weights (pt_inception-2015-12-05-{HASH}.pth is)")
    with loading(f"the Inception-v3 weights {path}"):
        return Inception(state).to(device)


def _published() -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=HASH, progress=False)
        except (OSError, RuntimeError, HTTPException) as error:  # no connection, no space, or bytes of another hash
            reason = str(error).splitlines()[0]
            raise UserError(
                f"the Inception-v3 weights could not be downloaded ({reason}): download {URL_INCEPTION_V3} and give the file to --feature_extractor"
            ) from None
    return path
