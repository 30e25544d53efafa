"""What scripts import: --help and a wrong option need no large library, and a run imports only what it uses."""

import json
import subprocess
import sys

from des.evaluation.inception import VARIANTS
from des.evaluation.text_image import JOBS
from des.models import families, pipelines
from des.training import codebook
from des.utils import choices

import pytest
from conftest import GOLDEN, ROOT, SCRIPTS, flags

LARGE = ("torch", "diffusers", "transformers", "pandas", "scipy", "matplotlib", "gradio", "cv2", "onnxruntime")
RUN = """
import json, runpy, sys
lines, watched = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for script, *options in lines:
    sys.argv = [script, *options]
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code
    loaded = [name for name in watched if name in sys.modules]
    print("\\nRAN", json.dumps([script, options, code, loaded]), file=sys.stderr)
"""


def ran(lines, watched):
    """Run command lines one after the other in one process; for each its script, options, exit code and the watched modules."""
    command = [sys.executable, "-c", RUN, json.dumps([[str(each) for each in line] for line in lines]), json.dumps(watched)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = [json.loads(line[4:]) for line in done.stderr.splitlines() if line.startswith("RAN ")]
    assert len(found) == len(lines), done.stderr
    return found


def test_help_and_wrong_options_load_no_large_library():
    asked = [[script, option] for script in SCRIPTS for option in ("--help", "--no_such_option=1")]
    assert len(SCRIPTS) > 20
    for script, options, code, loaded in ran(asked, LARGE):
        assert (script, options, code, loaded) == (script, options, 0 if options == ["--help"] else 2, [])


def test_encoding_a_codebook_does_not_import_diffusers(tmp_path):
    folder = GOLDEN / "A"
    options = flags(model_path=folder / "model", csv_path=folder / "safe.csv", save_dir=tmp_path / "cb", device="cpu")
    ((_, _, code, loaded),) = ran([["save_codebook.py", *options]], ["diffusers", "scipy.stats", "torch"])
    assert code == 0 and loaded == ["torch"] and (tmp_path / "cb/codebook.json").is_file()


@pytest.mark.parametrize(
    ("names", "implemented"),
    [
        (families.DTYPES, pipelines.DTYPES),
        (families.DTYPES, codebook.DTYPES),
        (choices.FID_VARIANTS, VARIANTS),
        (choices.SCORER_MODELS, JOBS),
    ],
)
def test_what_options_offer_is_what_is_implemented(names, implemented):
    assert list(names) == list(implemented)
