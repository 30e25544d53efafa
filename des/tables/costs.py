"""The columns of T8: what a protection costs in training, parameters, and time per image."""

from des.data.run_record import read_json
from des.models.encoders import load_encoder
from des.models.tensor_files import read_tensors
from des.tables.build import Cell
from des.tables.cells import ORIGINAL, Variant
from des.tables.pipeline_jobs import files_in
from des.tables.runner import TableRunner


def training_seconds(runner: TableRunner, variant: Variant) -> Cell:
    """How long the training of a variant took, targets included."""
    if variant.train is None or (missing := runner.untrainable(variant)):
        return Cell(missing="not trained here" if variant.train is None else missing)
    record = None if runner.dry else runner.records.record(runner.training(variant))
    return Cell(record["seconds"], digits=0) if record else Cell(missing="planned")


def extra_parameters(runner: TableRunner, variant: Variant) -> Cell:
    """The number of parameters that the protected encoder has more than the original."""
    if missing := runner.untrainable(variant):
        return Cell(missing=missing)
    files = files_in(runner.method(variant))
    if runner.dry or not files:
        return Cell(missing="planned" if files else "no text encoder file")
    original = load_encoder(runner.model_path, 1, "cpu", variant=runner.variant).model.state_dict()
    base = sum(tensor.numel() for tensor in original.values())
    return Cell(sum(tensor.numel() for tensor in read_tensors(files[0]).values()) - base, digits=0)


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
        seconds.append(drawn["seconds"] / drawn["images"])
    return Cell(seconds[1] - seconds[0], digits=3)
