"""What attacks minimise: distances of a text's embedding to a goal, and losses of the denoiser's prediction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from des.models.encoders import TextEncoder, not_padding
from des.models.pipelines import as_scheduler
from des.search.tokens import token_gradient
from des.utils.errors import UserError

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

Distance = Callable[[TextEncoder, Tensor, Tensor], Tensor]  # encoder, ids [n, length], goals [n, ...] -> [n]
_CHUNK = 128  # texts a forward pass


def pooled(encoder: TextEncoder, ids: Tensor) -> Tensor:
    """Return one embedding per prompt [n, hidden]: CLIP's pooled output, projected if the class projects it; T5's mean over tokens."""
    output = encoder.model(input_ids=ids.to(encoder.device))
    for name in ("text_embeds", "pooler_output"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    states = output.last_hidden_state
    mask = not_padding(ids, encoder.tokenizer.pad_token_id, encoder.tokenizer.eos_token_id).to(states)
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def pooled_cosine(encoder: TextEncoder, ids: Tensor, goals: Tensor) -> Tensor:
    """MMA-Diffusion's objective: 1 - cos of the pooled embeddings of `ids` and `goals` [n, hidden]."""
    return 1 - cosine_similarity(pooled(encoder, ids).float(), goals.float(), dim=-1)


def sequence_distance(encoder: TextEncoder, ids: Tensor, goals: Tensor) -> Tensor:
    """Ring-A-Bell's objective: the squared distance of the embeddings of `ids` to `goals` [n, rows, hidden], over all tokens."""
    return (encoder(ids).float() - goals.float()).square().flatten(1).sum(-1)


@dataclass
class TextGoals:
    """Goals of several prompts in every searched encoder, and the distance of texts to them: the mean over the encoders.

    `goals` holds one tensor [prompts, ...] per encoder.
    """

    encoders: Sequence[TextEncoder]
    goals: Sequence[Tensor]
    distance: Distance

    @torch.no_grad()
    def losses(self, texts: Sequence[str], which: Sequence[int]) -> Tensor:
        """Return the distance of each text to the goal of its prompt, number `which[i]`; on the CPU."""
        total = torch.zeros(len(texts))
        for encoder, goals in zip(self.encoders, self.goals, strict=True):
            parts = zip(encoder.tokenize(list(texts)).split(_CHUNK), torch.tensor(which).split(_CHUNK), strict=True)
            total += torch.cat([self.distance(encoder, ids, goals[of.to(goals.device)]).cpu() for ids, of in parts])
        return total / len(self.encoders)

    def gradient(self, texts: Sequence[str], slots: slice) -> Tensor:
        """Return the gradient [prompts, slots, vocabulary] of the distance of text i to goal i to the one-hot tokens in `slots`.

        Each position's gradient is scaled to norm 1 and summed over the encoders that have the first one's vocabulary. The other
        encoders count in `losses` only.
        """
        total = torch.zeros(())
        vocabulary = self.encoders[0].tokenizer.get_vocab()
        for encoder, goals in zip(self.encoders, self.goals, strict=True):
            if encoder.tokenizer.get_vocab() == vocabulary:
                rows = encoder.tokenize(list(texts)).to(encoder.device)
                found = token_gradient(encoder.model, rows, slots, partial(self.distance, encoder, rows, goals))
                total = total + normalize(found, dim=-1).cpu()
        return total


@torch.no_grad()
def pooled_goals(encoders: Sequence[TextEncoder], original: Sequence[TextEncoder], targets: list[str]) -> TextGoals:
    """MMA-Diffusion's goals: the pooled embeddings of the targets by the original encoders."""
    return TextGoals(encoders, [pooled(each, each.tokenize(targets)) for each in original], pooled_cosine)


@torch.no_grad()
def concept_direction(encoder: TextEncoder, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Return Ring-A-Bell's concept [rows, hidden]: the mean over pairs of E(prompt with the concept) - E(the same without it)."""
    with_it, without = (torch.cat(list(encoder.encode([pair[i] for pair in pairs], _CHUNK))).float() for i in (0, 1))
    return (with_it - without).mean(0)


class Denoiser:
    """The denoiser of an SD 1.x or 2.x pipeline as a function of text embeddings, with the losses of its training."""

    def __init__(self, pipe: DiffusionPipeline):
        if type(pipe).__name__ != "StableDiffusionPipeline":
            raise UserError(
                f"this attack needs the denoiser and supports Stable Diffusion 1.x and 2.x only, not a {type(pipe).__name__}; use mma.py, "
                "ring_a_bell.py or concept_inversion.py --objective embedding, which need text encoders only"
            )
        self.pipe = pipe
        self.unet = pipe.unet
        self.scheduler = as_scheduler(pipe.scheduler, DDPMScheduler)
        self.steps = self.scheduler.config.num_train_timesteps

    @torch.no_grad()
    def latents(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the scaled latents [n, channels, height, width] of images, the mode of the VAE's distribution.

        Raises UserError if the images differ in size, as rows with their own settings may.
        """
        if len({image.size for image in images}) > 1:
            raise UserError(
                "rows of different image sizes cannot be attacked together; leave out --use_row_settings, or use --batch_size 1"
            )
        vae, process = self.pipe.vae, self.pipe.image_processor.preprocess
        found = [vae.encode(process(image).to(vae.device, vae.dtype)).latent_dist.mode() for image in images]
        return torch.cat(found) * vae.config.scaling_factor

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return z_t of latents z_0 at `timesteps` [n]."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def predict(self, noisy: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """Return U(z_t, t, embeddings [n, rows, hidden]): the noise, or the velocity if the model predicts that."""
        return self.unet(noisy, timesteps, encoder_hidden_states=embeddings.to(self.unet.dtype)).sample

    def loss(self, latents: Tensor, noise: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """Return the mean squared error of the prediction for each row [n], against what the model was trained to predict."""
        target = (
            noise
            if self.scheduler.config.prediction_type == "epsilon"
            else self.scheduler.get_velocity(latents, noise, timesteps)
        )
        error = self.predict(self.noisy(latents, noise, timesteps), timesteps, embeddings).float() - target.float()
        return error.square().flatten(1).mean(-1)

    def noise(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Return Gaussian noise in the shape of `latents`, drawn on the CPU so that it is the same on every device."""
        return torch.randn(latents.shape, generator=generator).to(latents)
