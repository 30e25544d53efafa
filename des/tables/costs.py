"""The columns of T8: what a protection costs in training, parameters, and time per image."""

from itertools import pairwise
from pathlib import Path

from des.data.run_record import read_json
from des.generation.defences import ENCODER_OPTIONS
from des.models.checkpoints import plain_names, unwrapped
from des.models.encoders import load_encoder
from des.models.tensor_files import read_tensors
from des.tables.build import Cell
from des.tables.cells import ORIGINAL, Variant
from des.tables.runner import TableRunner


def training_seconds(runner: TableRunner, variant: Variant) -> Cell:
    """How long the training of a variant took, targets included."""
    if variant.train is None or (missing := runner.untrainable(variant)):
        return Cell(missing="not trained here" if variant.train is None else missing)
    record = None if runner.dry else runner.records.record(runner.training(variant))
    return Cell(record["seconds"], digits=0) if record else Cell(missing="planned")


def extra_parameters(runner: TableRunner, variant: Variant) -> Cell:
    """The number of parameters that the protected model has more than the original."""
    if missing := runner.untrainable(variant):
        return Cell(missing=missing)
    method = runner.method(variant)
    files = [(option, file) for option, file in pairwise(method) if isinstance(file, Path)]
    if runner.dry or not files:
        return Cell(missing="planned" if files else "no text encoder file")
    return Cell(sum(_added(runner, str(option), file) for option, file in files), digits=0)


def _added(runner: TableRunner, option: str, file: Path) -> int:
    """The number of parameters that a file for an option of generate.py adds to the model."""
    if option == "--unet_path":  # its tensors replace tensors of the same shapes
        return 0
    loaded, encoders = read_tensors(file), {f"--{name}": i for i, name in ENCODER_OPTIONS.items()}
    if option not in encoders:  # adapters
        return sum(tensor.numel() for tensor in loaded.values())
    own = load_encoder(runner.model_path, encoders[option], "cpu", variant=runner.variant).model.state_dict()
    loaded, own = plain_names(unwrapped(loaded)), plain_names(own)
    return sum(loaded[name].numel() - own[name].numel() for name in own.keys() & loaded.keys())


def extra_seconds(runner: TableRunner, variant: Variant) -> Cell:
    """Seconds per image of the benign set minus those of the original model, as measured by generate.py."""
    seconds = []
    if variant.images:
        return Cell(missing="images of another program")
    for each in (ORIGINAL, variant):
        folder = runner.drawn(each, runner.setup.benign)
        if isinstance(folder, str) or runner.dry:
            return Cell(missing="planned" if runner.dry else folder)
        drawn = read_json(folder / "run.json")["last_drawn"]
        if drawn["images"] != runner.drawn_of(runner.setup.benign)[0]:  # what an interruption left, perhaps a single image
            return Cell(missing="drawn in several parts")
        seconds.append(drawn["seconds"] / drawn["images"])
    return Cell(seconds[1] - seconds[0], digits=3)
