"""datasets/nearest_prompts.py: the prompts nearest to a concept and farthest from it, in the list's order, with their rows."""

from des.data.prompts import read_rows
from des.models.encoders import load_encoder
from des.training.losses import cos

from conftest import ROOT, flags

PIPELINE = ROOT / "demo/models/pipeline"
PROMPTS = [
    "a ball",
    "a red mushroom",
    "a blue box on a beach",
    "a mushroom",
    "a star",
    "a green toadstool",
    "a heart",
    "a moon",
]


def test_the_nearest_and_the_farthest_prompts(call, tmp_path):
    csv, out = tmp_path / "list.csv", (tmp_path / "nearest.csv", tmp_path / "farthest.csv")
    csv.write_text("prompt,source_row\n" + "".join(f"{prompt},{10 + i}\n" for i, prompt in enumerate(PROMPTS)))
    options = flags(model_path=PIPELINE, csv_path=csv, concept_prompt="mushroom", device="cpu", out=list(out))
    done = call("datasets/nearest_prompts.py", *options)
    assert done.code == 0, done.err
    concept, *others = next(load_encoder(str(PIPELINE)).encode(["mushroom", *PROMPTS], 20))
    order = sorted(range(8), key=lambda i: -cos(concept, others[i]).item())
    assert PROMPTS[order[0]] == "a mushroom"
    for path, rows in zip(out, (sorted(order[:2]), sorted(order[-2:])), strict=True):
        found = read_rows(path)
        assert found["prompt"].tolist() == [PROMPTS[row] for row in rows] and "a mushroom" in (
            PROMPTS[order[0]],
            *found["prompt"],
        )
        assert found["row"].tolist() == [str(row) for row in rows]
        assert found["source_row"].tolist() == [str(10 + row) for row in rows]
    refused = call("datasets/nearest_prompts.py", *options, "--share", 0.1)
    assert refused.failed_in_one_sentence and "or a longer list" in refused.err
