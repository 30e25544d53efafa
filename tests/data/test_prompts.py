"""Prompt CSVs: rows and their numbers, and what is never drawn."""

import logging

from des.data.prompts import never_drawn, read_prompts, read_rows
from des.utils.errors import UserError

import pytest


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_blank_rows_do_not_count(tmp_path):
    csv = write(tmp_path / "p.csv", "prompt,colour\na ball,red\n  ,blue\n\na box,\n")
    rows = read_rows(csv)
    assert list(rows.index) == [0, 1]
    assert rows["prompt"].tolist() == ["a ball", "a box"]
    assert rows["colour"].tolist() == ["red", ""]


def test_text_stays_text(tmp_path):
    csv = write(tmp_path / "p.csv", 'prompt\n007\nNA\nnull\n"a ""big"" one, red"\n', "utf-8-sig")
    assert read_prompts(csv) == ["007", "NA", "null", 'a "big" one, red']


@pytest.mark.parametrize("title", ["Prompt", " prompt", "PROMPT ", '" prompt"'])
def test_the_column_may_be_written_in_capitals_or_with_blanks(tmp_path, title):
    rows = read_rows(write(tmp_path / "p.csv", f"colour,{title}\nred,a ball\n"))
    assert rows.to_dict("list") == {"colour": ["red"], "prompt": ["a ball"]}


def test_sampling_is_the_published_draw(tmp_path):
    csv = write(tmp_path / "p.csv", "prompt\n" + "\n".join(f"prompt {i}" for i in range(100)) + "\n")
    half = read_prompts(csv, 0.5)
    assert half == read_rows(csv)["prompt"].sample(frac=0.5, random_state=42).tolist()
    assert len(half) == 50


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("text\na ball\n", "no column `prompt`, only 1 other column; rename the column `text` to `prompt`"),
        ("n,colour\n1,red\n", "no column `prompt`, only `n`, `colour`; name the column of prompts `prompt`"),
        ("a red ball,n\n1,red\n", "no column `prompt`, only `n` and 1 other column"),
        ("Prompt, prompt\na,b\n", "two columns named `prompt`"),
        ("prompt;n\na ball, red;1\n", "columns separated by semicolons"),
        ("n\tPrompt\n1\ta ball\n", "columns separated by tabs"),
        ("sep=,\nprompt,n\na ball,1\n", "Excel's line `sep=`"),
        ('{"prompt": "a ball"}\n', "is JSON, not CSV; .*--convert"),
        ('[{"prompt": "a ball"}]', "is JSON, not CSV; .*--convert"),
        ("PAR1\x00", "is a parquet file, not CSV; .*--convert"),
        ("", "not a readable CSV"),
        ("prompt\n\n", "no prompt"),
        ('prompt\n"a\n', "open quote"),
        ("prompt\na, b\n", "more cells"),
        ("prompt\na\nb, c\n", "more cells"),
    ],
)
def test_unusable_files_are_refused(tmp_path, text, says):
    with pytest.raises(UserError, match=says):
        read_prompts(write(tmp_path / "p.csv", text))


def test_a_stray_quotation_mark_is_named_with_its_line_and_merges_no_rows(tmp_path):
    text = 'prompt,colour\na ball,red\n"a box,blue\na cup,red\na "tall" hat,red\na house",blue\na tree,red\n'
    with pytest.raises(UserError, match="row that begins at line 3"):
        read_rows(write(tmp_path / "p.csv", text))
    with pytest.raises(UserError, match="row that begins at line 2"):
        read_rows(write(tmp_path / "p.csv", 'prompt\n"a ball\na box\n"a cup"\na tree\n'))


def test_a_line_break_inside_a_cell_is_kept_and_logged(tmp_path, caplog):
    caplog.set_level("INFO", "des")
    logging.getLogger("des").addHandler(caplog.handler)
    try:
        rows = read_rows(write(tmp_path / "p.csv", 'prompt\n"a ball\non grass"\na "tall" box\n' + f"{'x' * 200_000}\n"))
    finally:
        logging.getLogger("des").removeHandler(caplog.handler)
    assert rows["prompt"].tolist()[:2] == ["a ball\non grass", 'a "tall" box']
    assert "3 rows, 1 with line breaks inside a cell" in caplog.text


def test_other_encodings_and_missing_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="save it as UTF-8"):
        read_prompts(write(tmp_path / "p.csv", "prompt\nun château\n", "latin-1"))
    with pytest.raises(UserError, match=r"the prompt file .* does not exist"):
        read_prompts(tmp_path / "none.csv")


def test_minors_in_a_sexual_context_are_never_drawn():
    prompts = ["a child flies a kite", "kid, nsfw", "statue, nsfw", "a ball"] + ["a house"] * 40
    assert never_drawn(prompts) == [1]


def test_a_sexual_list_drops_every_prompt_that_names_a_minor():
    prompts = [
        "statue, nsfw",
        "a child flies a kite",
        "a 12 year old with a kite",
        "a 40 year old with a kite",
        "kidney beans",
    ]
    assert never_drawn(prompts) == [1, 2]
