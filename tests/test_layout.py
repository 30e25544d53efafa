"""The rule between the rooms of des/: what may import what, and which functions may read a command line."""

import ast
import graphlib
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS

# A room imports rooms to its left only.
ROOMS = [
    "utils",
    "data",
    "models",
    "search",
    "training",
    "evaluation",
    "export",
    "generation",
    "attacks",
    "report",
    "tables",
    "app",
    "api",
]
READS_OPTIONS = ("add_", "check_", "open_", "__torch_function__")  # torch calls the last one's positional arguments `args`
FILES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "des").rglob("*.py"))}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """The line and the full name of everything that a module imports, inside functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: name the module in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name if name in MODULES else node.module) for name in names]
    return found


def is_script(module: str) -> bool:
    """Whether a module lies in the repository and outside des/: a script, or a part of the demo."""
    path = ROOT / module.replace(".", "/")
    return not module.startswith("des.") and (
        path.with_suffix(".py").is_file() or (ROOT / module.split(".")[0] / "__init__.py").is_file()
    )


def report(lines: list[str]) -> None:
    assert not lines, "\n" + "\n".join(lines)


def test_rooms_import_only_rooms_to_their_left():
    lines = []
    for path, tree in FILES.items():
        room = path.relative_to(ROOT).parts[1].removesuffix(".py")
        if room not in (*ROOMS, "__init__"):
            lines.append(f"{path.relative_to(ROOT)}: {room} is not in the list of rooms")
            continue
        for line, module in sorted(set(imports(tree))):
            other = [*module.split("."), ""][1]
            if room in ROOMS and module.startswith("des.") and other in ROOMS[ROOMS.index(room) + 1 :]:
                lines.append(f"{path.relative_to(ROOT)}:{line}: {room} imports {module}")
    report(lines)


def test_no_module_imports_a_script():
    report(
        [
            f"{path.relative_to(ROOT)}:{line}: imports {module}"
            for path, tree in FILES.items()
            for line, module in sorted(set(imports(tree)))
            if is_script(module)
        ]
    )


def test_there_is_no_circle_of_imports():
    graph = {module_of(path): {name for _, name in imports(tree) if name in MODULES} for path, tree in FILES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        report([" imports ".join(reversed(error.args[1]))])


def namespaces(tree: ast.AST) -> list[tuple[int, str]]:
    """The line and name of each function that takes a Namespace, by its annotation or by the name `args`, and may not."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)) and not getattr(node, "name", "").startswith(READS_OPTIONS):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            takes = any(
                "Namespace" in ast.unparse(each.annotation) if each.annotation else each.arg == "args" for each in given
            )
            found += [(node.lineno, getattr(node, "name", "lambda"))] if takes else []
        elif isinstance(node, ast.AnnAssign) and "Namespace" in ast.unparse(node.annotation):
            found.append((node.lineno, ast.unparse(node.target)))
    return found


def test_only_functions_that_declare_or_read_options_take_a_namespace():
    report(
        [
            f"{path.relative_to(ROOT)}:{line}: {name} takes an argparse.Namespace"
            for path, tree in FILES.items()
            for line, name in namespaces(tree)
        ]
    )


def test_the_rules_see_what_they_forbid():
    code = """
def run(args): ...
def run_too(options: "argparse.Namespace | None"): ...
def open_it(args): ...
each = lambda args: None
def inside():
    from demo import world
    import des.app
"""
    tree = ast.parse(code)
    assert namespaces(tree) == [(2, "run"), (3, "run_too"), (5, "lambda")]
    assert (
        imports(tree) == [(7, "demo"), (8, "des.app")]
        and is_script("demo")
        and is_script("generate")
        and not is_script("des.app")
    )


def bound(statements: list[ast.stmt]) -> set[str]:
    """The names that a module's statements bind: imports, functions, classes and assignments."""
    targets = [target for each in statements if isinstance(each, ast.Assign) for target in each.targets]
    names = {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    imported = [alias for each in statements if isinstance(each, ast.Import | ast.ImportFrom) for alias in each.names]
    names |= {(alias.asname or alias.name).split(".")[0] for alias in imported}
    return names | {each.name for each in statements if isinstance(each, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_options_are_parsed_without_the_imports_that_follow(script):
    """A script parses its options in the middle of the file; a name that is imported below would be a NameError there."""
    body = ast.parse((ROOT / script).read_text(encoding="utf-8")).body
    (middle,) = [i for i, each in enumerate(body) if isinstance(each, ast.If) and "cli.run(parse_args)" in ast.unparse(each)]
    functions = {each.name: each for each in body[:middle] if isinstance(each, ast.FunctionDef)}
    used, queue = set(), ["parse_args"]
    while queue:
        nodes = list(ast.walk(functions[queue.pop()]))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        local = bound(nodes) | {node.id for node in names if isinstance(node.ctx, ast.Store)}
        found = {node.id for node in names} - local - used
        used |= found
        queue += sorted(found & functions.keys())
    assert used & (bound(body[middle:]) - bound(body[:middle])) == set()
