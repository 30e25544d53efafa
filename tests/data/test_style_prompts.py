"""Lists for removing a style: what is trained on, what is kept, what is tested."""

from des.data.prompts import read_prompts

import pytest
from conftest import ROOT

CONTENTS = ROOT / "datasets/demo_benign.csv"


@pytest.fixture
def lists(call, tmp_path):
    def run(artist="A. Nonymous", **options):
        given = {"contents": CONTENTS, "count": 120, "test": 30, "name": "style", "dir": tmp_path} | options
        done = call(
            "datasets/style_prompts.py", artist, *(part for key, value in given.items() for part in (f"--{key}", value))
        )
        return done, {part: tmp_path / f"style_{part}.csv" for part in ("unsafe", "safe", "test")}

    return run


def test_lists_and_what_they_share(lists):
    done, paths = lists()
    assert done.code == 0, done.err
    unsafe, safe, test = (read_prompts(path) for path in paths.values())
    assert (len(unsafe), len(test)) == (120, 30) and len(safe) > 120
    assert all("A. Nonymous" in prompt for prompt in unsafe + test) and not any("A. Nonymous" in prompt for prompt in safe)
    contents = set(read_prompts(CONTENTS))
    trained = set(safe) & contents
    assert len(trained) == 120 and all(any(prompt.startswith(content) for content in trained) for prompt in unsafe)
    assert not any(prompt.startswith(content + " ") for prompt in test for content in trained)
    assert any(prompt.endswith("in the style of Claude Monet") for prompt in safe)


def test_a_seed_fixes_them(lists):
    first = [path.read_bytes() for path in lists()[1].values()]
    assert first == [path.read_bytes() for path in lists()[1].values()]
    assert first != [path.read_bytes() for path in lists(seed=1)[1].values()]


@pytest.mark.parametrize("options", [{"count": 420}, {"artist": " "}, {"artist": "claude monet"}, {"contents": "none.csv"}])
def test_what_cannot_be_written(lists, options):
    done, paths = lists(**options)
    assert done.failed_in_one_sentence and not any(path.exists() for path in paths.values())


def test_the_test_list_may_be_left_out_and_a_downloaded_one_is_never_overwritten(lists, tmp_path):
    (tmp_path / "style_test.json").write_text("{}")
    done, paths = lists()
    assert done.failed_in_one_sentence and "style_test.csv is a downloaded list" in done.err
    done, paths = lists(test=0)
    assert done.code == 0 and [part for part, path in paths.items() if path.exists()] == ["unsafe", "safe"]
