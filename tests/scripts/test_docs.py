"""What the documents promise: lines, commands and files that exist."""

import re

import pytest
from conftest import ROOT, SCRIPTS, TOOLS


def test_each_formula_is_at_its_line():
    rows = re.findall(
        r"\[([\w/]+\.py):(\d+)\]\(\.\./([\w/]+\.py)#L(\d+)\) \| `` (.+) `` \|", (ROOT / "docs/method.md").read_text()
    )
    assert len(rows) == 27
    for path, line, link, anchor, code in rows:
        assert (path, line) == (link, anchor)
        assert code in (ROOT / path).read_text().splitlines()[int(line) - 1], f"{path}:{line} is not `{code}`"


@pytest.mark.parametrize("script", SCRIPTS + TOOLS)
def test_help_shows_an_example_and_every_option_of_it(call, script):
    done = call(script, "--help")
    assert done.code == 0
    example = re.search(rf"python {re.escape(script)}(?:.*\\\n)*.*", done.out)
    assert example, "the help has no example"
    options = set(re.findall(r"--\w+", example[0]))
    assert options
    described = done.out.replace(example[0], "")
    assert all(option in described for option in options)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_readmes_commands_are_accepted(call, script):
    """Every option that the README passes to a script is in its help."""
    text = (ROOT / "README.md").read_text()
    used = {
        option
        for command in re.findall(rf"python {re.escape(script)}((?:.*\\\n)*.*)", text)
        for option in re.findall(r"--\w+", command)
    }
    described = call(script, "--help").out
    assert all(option in described for option in used)


def test_files_that_the_readme_links_to_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text())
    assert len(links) > 3
    assert not [link for link in links if not (ROOT / link).exists()]
