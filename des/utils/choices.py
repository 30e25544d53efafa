"""The choices of command-line options. They are apart from the modules that implement them, so that `--help` is quick."""

CHECKPOINT_FORMATS = ("pt", "safetensors", "hf")

PRECISIONS = ("fp32", "tf32", "bf16", "bf16_weights")
OPTIMIZERS = ("adamw", "adamw_bf16_sr", "adamw8bit")
TARGETS = ("lowest", "highest", "random")  # the codebook row that is an unsafe prompt's target, by cosine similarity
TRACKERS = ("tensorboard", "wandb")

LPIPS_NETS = {"alex": 31, "vgg": 16, "squeeze": 17}  # backbones, with the smallest image side in pixels
FID_VARIANTS = ("paper", "torch-fidelity", "clean-fid")
MODEL_VARIANT = "the model's own"  # the FID variant for other image models, with their preprocessing
SCORER_MODELS = {
    "pickscore": {"model": "yuvalkirstain/PickScore_v1", "processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"},
    "blipscore": {"model": "Salesforce/blip-image-captioning-base", "clip_model": "openai/clip-vit-base-patch32"},
    "imagereward": {"model": "THUDM/ImageReward", "processor": "google-bert/bert-base-uncased"},
}
"""For each job of fid.py, the options that name its models, with the published models as defaults."""

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".json", ".txt")  # files that datasets/download.py converts
MOST_STEPS = 150  # the most denoising steps that the app allows
MOST_GUIDANCE = 50
