"""Values that options offer, apart from the modules that implement them, so that `--help` loads no library."""

CHECKPOINT_FORMATS = ("pt", "safetensors", "hf")

PRECISIONS = ("fp32", "tf32", "bf16", "bf16_weights")
OPTIMIZERS = ("adamw", "adamw_bf16_sr", "adamw8bit")
TARGETS = ("lowest", "highest", "random")  # which codebook row is an unsafe prompt's target, by cosine similarity
TRACKERS = ("tensorboard", "wandb")

LPIPS_NETS = {"alex": 31, "vgg": 16, "squeeze": 17}  # backbones, with the pixels a side that their layers need
FID_VARIANTS = ("paper", "torch-fidelity", "clean-fid")
MODEL_VARIANT = "the model's own"  # the FID variant of an image model, which brings its own preprocessing
SCORER_MODELS = {
    "pickscore": {"model": "yuvalkirstain/PickScore_v1", "processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"},
    "blipscore": {"model": "Salesforce/blip-image-captioning-base", "clip_model": "openai/clip-vit-base-patch32"},
    "imagereward": {"model": "THUDM/ImageReward", "processor": "google-bert/bert-base-uncased"},
}
"""By job of fid.py, the options that name its models, with the published models."""

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".json", ".txt")  # of files that datasets/download.py converts
MOST_STEPS = 150  # denoising steps that the app draws with
MOST_GUIDANCE = 50
