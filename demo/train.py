"""Train the demo's models from scratch on drawn pictures: tokenizer, CLIP, autoencoder, classifiers, UNet.

    python demo/train.py                      # every stage in turn; run it again to resume
    python demo/train.py --stages unet        # one stage; the stages before it must be finished

Every batch is drawn from (seed, stage, step), so an interrupted run resumes with the same data.
The finished models are written to demo/models/: `pipeline` (StableDiffusionPipeline), `clip` (CLIPModel) and
`classifier_object`, `classifier_colour`, `classifier_background` (ResNetForImageClassification), all in fp16.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from des.utils import cli
from des.utils.files import write_json, write_text

MODELS = Path(__file__).resolve().parent / "models"
STAGES = ("tokenizer", "clip", "vae", "classifiers", "unet", "gates")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    main_group = parser.add_argument_group("main")
    main_group.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="stages to train")
    main_group.add_argument(
        "--out", type=cli.output_folder, default=MODELS, metavar="DIR", help="folder for the finished models"
    )
    work = MODELS.parent / "work"
    # fmt: off
    main_group.add_argument("--work_dir", type=cli.output_folder, default=work, metavar="DIR", help="resumable states and caches")
    # fmt: on
    main_group.add_argument("--seed", type=cli.natural, default=0, metavar="S", help="seeds every random draw")
    lengths = parser.add_argument_group("lengths")
    for option, default, description in (
        ("clip_steps", 3500, "steps of the CLIP"), ("clip_batch", 192, "captions and pictures a step of the CLIP"),
        ("vae_steps", 2000, "steps of the VAE"), ("classifier_steps", 1000, "steps of each classifier"),
        ("unet_steps", 5500, "steps of the UNet"), ("latents", 40_000, "pictures in the UNet's training set"),
    ):  # fmt: skip
        lengths.add_argument(f"--{option}", type=cli.positive_int, default=default, metavar="N", help=description)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(parse_args)  # --help and wrong options end here, before the libraries below load

from demo.world import BACKGROUNDS, COLOURS, KINDS, SIZE, Scene, caption, random_scene, render

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)
from transformers.models.clip.configuration_clip import CLIPConfig

MAX_TOKENS = 24
LABELS = {"object": KINDS, "colour": tuple(COLOURS), "background": tuple(BACKGROUNDS)}


@dataclass
class Stage:
    """One training run: which steps, how fast, and where its resumable state is kept."""

    name: str
    steps: int
    learning_rate: float
    seed: int
    work_dir: Path
    weight_decay: float = 0.01
    warmup: int = 100
    ema_decay: float | None = None
    save_every: int = 250

    def rng(self, step: int) -> random.Random:
        return random.Random(f"{self.seed}-{self.name}-{step}")

    def run(self, model: torch.nn.Module, loss_of_step: Callable[[int, random.Random], torch.Tensor]) -> None:
        """Train `model` in place (to its moving average where one is kept), resuming from the last saved state."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        ema = EMAModel(model.parameters(), decay=self.ema_decay) if self.ema_decay else None
        state_path = self.work_dir / f"{self.name}.state.pt"
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler} | ({"ema": ema} if ema else {})
        first = 0
        if state_path.exists():
            state = torch.load(state_path, map_location="cpu", weights_only=True)
            first = state.pop("step")
            for key, part in parts.items():
                part.load_state_dict(state[key])
        model.train()
        bar = tqdm(range(first, self.steps), initial=first, total=self.steps, desc=self.name, mininterval=5)
        for step in bar:
            torch.manual_seed(self.rng(step).getrandbits(62))
            loss = loss_of_step(step, self.rng(step))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if ema:
                ema.step(model.parameters())
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            if (step + 1) % self.save_every == 0 or step + 1 == self.steps:
                _save_atomically({key: part.state_dict() for key, part in parts.items()} | {"step": step + 1}, state_path)
        if ema:
            ema.copy_to(model.parameters())
        model.eval().requires_grad_(False)

    def _lr_factor(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))


def _save_atomically(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def pictures(scenes: list[Scene], rng: random.Random) -> torch.Tensor:
    """Render scenes as a float tensor [N, 3, 32, 32] in -1..1."""
    array = np.stack([np.asarray(render(scene, rng)) for scene in scenes])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------- stages


def train_tokenizer(args: argparse.Namespace) -> None:
    """A byte-level BPE in the format of CLIPTokenizer, learnt from captions."""
    rng = random.Random(f"{args.seed}-tokenizer")
    corpus = (caption(random_scene(rng), rng) for _ in range(20_000))
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), tokenizer.pre_tokenizer])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1100, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(corpus, trainer)
    folder = args.work_dir / "bpe"
    folder.mkdir(exist_ok=True)
    tokenizer.model.save(str(folder))
    _clip_tokenizer(folder).save_pretrained(args.work_dir / "tokenizer")


def write_files_of_transformers_4(folder: Path) -> None:
    """Write the files that transformers 4 reads, besides those that transformers 5 saves, for a tokenizer and a processor."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    write_text(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, model["merges"])]) + "\n")
    processor = folder / "processor_config.json"
    if processor.exists():
        write_json(folder / "preprocessor_config.json", json.loads(processor.read_text(encoding="utf-8"))["image_processor"])


def _clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Read vocab.json and merges.txt in CLIP's layout: letters, letters that end a word, merges, two special tokens."""
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines() if not line.startswith("#")]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def train_clip(args: argparse.Namespace) -> None:
    """Contrastive training of the text and image towers; the text tower becomes the pipeline's text encoder."""
    tokenizer = CLIPTokenizer.from_pretrained(args.work_dir / "tokenizer")
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    tower = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "projection_dim": 64}
    text = CLIPTextConfig(
        **tower, vocab_size=len(tokenizer), intermediate_size=512, max_position_embeddings=MAX_TOKENS,
        bos_token_id=bos, eos_token_id=eos, pad_token_id=eos,
    )  # fmt: skip
    vision = CLIPVisionConfig(**tower, intermediate_size=512, image_size=SIZE, patch_size=8)
    torch.manual_seed(args.seed)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))

    def loss_of_step(step: int, rng: random.Random) -> torch.Tensor:
        scenes = [random_scene(rng) for _ in range(args.clip_batch)]
        tokens = tokenizer([caption(scene, rng) for scene in scenes], padding=True, truncation=True, return_tensors="pt")
        model.logit_scale.data.clamp_(max=math.log(100))
        return model(input_ids=tokens.input_ids, pixel_values=pictures(scenes, rng), return_loss=True).loss

    Stage("clip", args.clip_steps, 1e-3, args.seed, args.work_dir, weight_decay=0.05).run(model, loss_of_step)
    size = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessor(size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    model.half().save_pretrained(args.out / "clip")
    CLIPProcessor(images, tokenizer).save_pretrained(args.out / "clip")
    write_files_of_transformers_4(args.out / "clip")


def train_vae(args: argparse.Namespace) -> None:
    """Train a small autoencoder that halves the size; its latents are scaled to unit variance."""
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, layers_per_block=1, norm_num_groups=8, sample_size=SIZE,
    ).to(memory_format=torch.channels_last)  # fmt: skip

    def loss_of_step(step: int, rng: random.Random) -> torch.Tensor:
        x = pictures([random_scene(rng) for _ in range(48)], rng)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        return F.mse_loss(y, x) + 0.05 * F.l1_loss(y, x) + 1e-5 * posterior.kl().mean() / x[0].numel()

    Stage("vae", args.vae_steps, 2e-3, args.seed, args.work_dir, weight_decay=0.0).run(vae, loss_of_step)
    rng = random.Random(f"{args.seed}-vae-check")
    x = pictures([random_scene(rng) for _ in range(512)], rng)
    latents = vae.encode(x).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    mse = F.mse_loss(vae.decode(latents).sample.clamp(-1, 1), x).item()
    print(f"autoencoder: {10 * math.log10(4 / mse):.1f} dB on 512 unseen renders")
    vae.half().save_pretrained(args.work_dir / "vae")


def train_classifiers(args: argparse.Namespace) -> None:
    """Train classifiers of object, colour and background on clean renders and on the autoencoder's reconstructions."""
    vae = AutoencoderKL.from_pretrained(args.work_dir / "vae", torch_dtype=torch.float32).eval().requires_grad_(False)
    processor = ViTImageProcessor(size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for label, names in LABELS.items():
        torch.manual_seed(args.seed)
        model = ResNetForImageClassification(
            ResNetConfig(
                embedding_size=32, hidden_sizes=[32, 64, 128] if label == "object" else [16, 32, 64], depths=[1, 1, 1],
                layer_type="basic", id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
            )
        )  # fmt: skip

        def loss_of_step(step: int, rng: random.Random, model=model, label=label, names=names) -> torch.Tensor:
            scenes = [random_scene(rng) for _ in range(64)]
            x = pictures(scenes, rng)
            with torch.no_grad():
                x[::2] = vae.decode(vae.encode(x[::2]).latent_dist.sample()).sample.clamp(-1, 1)
            x += torch.randn_like(x) * rng.uniform(0, 0.1)
            x = F.interpolate(x, (64, 64), mode="bilinear")
            key = "kind" if label == "object" else label
            target = torch.tensor([names.index(getattr(scene, key)) for scene in scenes])
            return F.cross_entropy(model(x).logits, target, label_smoothing=0.02)

        name = f"classifier_{label}"
        steps = args.classifier_steps if label == "object" else args.classifier_steps // 2
        Stage(name, steps, 2e-3, args.seed, args.work_dir).run(model, loss_of_step)
        model.half().save_pretrained(args.out / name)
        processor.save_pretrained(args.out / name)


def train_unet(args: argparse.Namespace) -> None:
    """Train the denoiser: v-prediction with min-SNR weights, on cached latents; each draw of a picture gets a new caption."""
    tokenizer = CLIPTokenizer.from_pretrained(args.work_dir / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(args.out / "clip", torch_dtype=torch.float32).eval().requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(args.work_dir / "vae", torch_dtype=torch.float32).eval().requires_grad_(False)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False,
        rescale_betas_zero_snr=True, timestep_spacing="trailing", set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(32, 64, 96), norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=128,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    scenes, latents = _cached_latents(vae, args)

    def loss_of_step(step: int, rng: random.Random) -> torch.Tensor:
        rows = [rng.randrange(len(scenes)) for _ in range(64)]
        captions = ["" if rng.random() < 0.1 else caption(scenes[row], rng) for row in rows]
        tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        x = latents[rows].float() * vae.config.scaling_factor
        noise = torch.randn_like(x)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(rows),))
        with torch.no_grad():
            text = _blurred(text_encoder(tokens.input_ids).last_hidden_state)
            noisy, target = scheduler.add_noise(x, noise, t), scheduler.get_velocity(x, noise, t)
        error = (unet(noisy, t, text).sample - target).square().mean(dim=(1, 2, 3))
        alpha_bar = scheduler.alphas_cumprod[t]
        weight = (5 * (1 - alpha_bar)).clamp(max=1)  # min(1, 5 / (SNR + 1))
        return (weight * error).mean()

    stage = Stage("unet", args.unet_steps, 1.5e-3, args.seed, args.work_dir, ema_decay=0.998)
    stage.run(unet, loss_of_step)
    vae.register_to_config(_name_or_path="vae")  # not the folder on this machine
    StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(args.out / "pipeline")  # fmt: skip
    write_files_of_transformers_4(args.out / "pipeline/tokenizer")


def _blurred(text: torch.Tensor) -> torch.Tensor:
    """Shift a random half of the text embeddings [B, T, D] a little in the direction between two others of the batch.

    Without this, the denoiser sees exactly one embedding per caption and fails after the smallest change of the text encoder, which
    the denoisers of large models do not.
    """
    batch = text.shape[0]
    amount = torch.rand(batch, 1, 1) * 0.35 * (torch.rand(batch, 1, 1) < 0.5)
    return text + amount * (text[torch.randperm(batch)] - text[torch.randperm(batch)])


def _cached_latents(vae: AutoencoderKL, args: argparse.Namespace) -> tuple[list[Scene], torch.Tensor]:
    rng = random.Random(f"{args.seed}-latents")
    scenes = [random_scene(rng) for _ in range(args.latents)]
    path = args.work_dir / "latents.pt"
    if not path.exists():
        chunks = tqdm(range(0, len(scenes), 256), desc="latents", mininterval=5)
        latents = [vae.encode(pictures(scenes[i : i + 256], rng)).latent_dist.mode().half() for i in chunks]
        _save_atomically({"latents": torch.cat(latents)}, path)
    return scenes, torch.load(path, weights_only=True)["latents"]


def train_gates(args: argparse.Namespace) -> None:
    """Print whether the models are good enough to measure DES on them (demo/gates.py)."""
    if args.out.resolve() != MODELS:
        sys.exit(f"error: the stage gates checks the models in {MODELS}; leave --out at its default")
    gates = Path(__file__).resolve().parent / "gates.py"
    subprocess.run([sys.executable, gates, "--out", args.work_dir / "gates"], check=True)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        start = time.monotonic()
        globals()[f"train_{stage}"](args)
        print(f"{stage}: {(time.monotonic() - start) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
