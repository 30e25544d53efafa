"""What the documents promise: formulas, commands and files that exist."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
]


def source_of(path: str, name: str) -> str:
    """The source of a function, `Class.method` or constant of a file; empty if the file does not define it."""
    text = (ROOT / path).read_text(encoding="utf-8")
    node = ast.parse(text)
    for part in name.split("."):
        node = next((each for each in ast.iter_child_nodes(node) if defines(each, part)), None)
        if node is None:
            return ""
    return ast.get_source_segment(text, node)


def defines(node: ast.AST, name: str) -> bool:
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(isinstance(target, ast.Name) and target.id == name for target in targets)
    return isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name


def test_each_formula_is_in_the_function_that_its_row_names():
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    rows = re.findall(r"\[([\w/]+\.py)::([\w.]+)\]\(\.\./([\w/]+\.py)\) \| `` (.+) `` \|", text)
    assert len(rows) == len(re.findall(r"^\| .*``", text, re.MULTILINE)) > 20
    wrong = [
        f"{path}::{name}: `{code}`" for path, name, link, code in rows if path != link or code not in source_of(path, name)
    ]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_an_example_and_every_option_of_it(call, script):
    done = call(script, "--help")
    assert done.code == 0
    example = re.search(rf"python {re.escape(script)}(?:.*\\\n)*.*", done.out)
    assert example, "the help has no example"
    options = set(re.findall(r"--\w+", example[0]))
    described = done.out.replace(example[0], "")
    assert all(option in described for option in options)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands_of_the_pages_are_accepted(call, script):
    """Every option that a page passes to a script is in its help."""
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    used = {
        option
        for command in re.findall(rf"python {re.escape(script)}((?:.*\\\n)*.*)", text)
        for option in re.findall(r"--\w+", command)
    }
    described = call(script, "--help").out
    assert all(option in described for option in used)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_links_to_or_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = {str(Path(page).parent / link) for link in re.findall(r"\]\((?!http)([^)#]+)", text)}
    named = set(re.findall(r"(?<![\w/])(?:des|demo|docs|scripts|tasks|tests)/[\w/]+\.(?:py|md|sh|toml|csv)\b", text))
    assert page != "README.md" or (len(links) > 3 and text.count("\n") <= 160)
    assert not sorted(path for path in links | named if not (ROOT / path).exists())
