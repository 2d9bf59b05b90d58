"""How the code is cut: short files, short functions, public functions typed and described, tests beside what they test."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILE_LINES = 400
FUNCTION_LINES = 60
PYTHON_FOLDERS = ("trdq_core", "studio", "training", "benchmarks", "tests")
PUBLIC_FOLDERS = ("trdq_core", "studio")
IGNORED = {
    ".git",
    ".venv",
    "venv",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
    "node_modules",
    "runs",
    "out",
    "build",
    "dist",
}
TEXT = {
    ".py",
    ".md",
    ".toml",
    ".txt",
    ".json",
    ".cpp",
    ".h",
    ".css",
    ".js",
    ".csv",
    ".yml",
    ".yaml",
    ".sh",
    "",
}
# Test folders that stand for a way of testing, not for a room of the code.
KINDS_OF_TESTS = {"browser"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*folders: str) -> list[Path]:
    """Python files of the folders and app.py, by path from the root."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    if (ROOT / "app.py").exists() and "studio" in folders:
        found.append(ROOT / "app.py")
    return [path.relative_to(ROOT) for path in found if not IGNORED & set(path.parts)]


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def functions(tree: ast.AST) -> Iterator[Function]:
    """Every function and method, nested ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def public_functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Public top-level functions, and the constructor and public methods of public classes, with their dotted names."""
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, Function) and (inner.name == "__init__" or not inner.name.startswith("_")):
                    yield f"{node.name}.{inner.name}", inner


def untyped(function: Function, *, method: bool) -> list[str]:
    """Names of arguments without a type, and "return" where the result has none."""
    arguments = [*function.args.posonlyargs, *function.args.args]
    static = any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)
    if method and not static:
        arguments = arguments[1:]
    arguments += [*function.args.kwonlyargs, *filter(None, (function.args.vararg, function.args.kwarg))]
    missing = [argument.arg for argument in arguments if argument.annotation is None]
    return missing + (["return"] if function.returns is None else [])


def needs_docstring(name: str, function: Function) -> bool:
    """Constructors, torch's own hooks and property setters are described by their class."""
    decorators = " ".join(ast.unparse(decorator) for decorator in function.decorator_list)
    hooks = ("__init__", "forward", "extra_repr")
    return name.rpartition(".")[2] not in hooks and not re.search(r"overload|override|\.setter", decorators)


@pytest.mark.parametrize("path", python_files(*PYTHON_FOLDERS), ids=str)
def test_files_are_short(path: Path) -> None:
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= FILE_LINES, f"{path} has {lines} lines; split it, {FILE_LINES} is the most"


@pytest.mark.parametrize("path", python_files(*PYTHON_FOLDERS), ids=str)
def test_functions_are_short(path: Path) -> None:
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions(parse(path))}
    long = {name: length for name, length in lengths.items() if length > FUNCTION_LINES}
    assert not long, f"{path}: functions of more than {FUNCTION_LINES} lines: {long}"


@pytest.mark.parametrize("path", python_files(*PUBLIC_FOLDERS), ids=str)
def test_public_functions_are_typed(path: Path) -> None:
    missing = {
        name: gaps for name, node in public_functions(parse(path)) if (gaps := untyped(node, method="." in name))
    }
    assert not missing, f"{path}: no types for {missing}"


@pytest.mark.parametrize("path", python_files(*PUBLIC_FOLDERS), ids=str)
def test_public_functions_are_described(path: Path) -> None:
    tree = parse(path)
    bare = [
        name for name, node in public_functions(tree) if needs_docstring(name, node) and not ast.get_docstring(node)
    ]
    bare += [
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert not bare, f"{path}: no docstring on {', '.join(bare)}"


@pytest.mark.parametrize("path", python_files(*PUBLIC_FOLDERS, "training", "benchmarks"), ids=str)
def test_modules_are_described(path: Path) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    assert not source.strip() or ast.get_docstring(ast.parse(source)), f"{path} does not say what it is for"


def test_no_drawer_for_everything() -> None:
    """A function lives where its subject is; a file called utils has no subject."""
    drawers = {"utils.py", "helpers.py", "misc.py", "common.py"}
    found = [str(path) for path in python_files(*PUBLIC_FOLDERS, "training", "benchmarks") if path.name in drawers]
    assert not found, f"name these by what they hold: {', '.join(found)}"


# Joined here so that this file does not find itself.
FOREIGN = re.compile(
    "|".join(
        [
            r"(?<![\w.~])/(?:work|root|home|opt|Users)" + r"/\w",
            "pypi" + r"\.org",
            "files" + r"\.pythonhosted",
            "registry" + r"\.npmjs",
            "deb" + r"\.debian\.org",
            r"[A-Z]:\\" + "Users",
        ]
    )
)


def text_files() -> list[Path]:
    found = (path for path in sorted(ROOT.rglob("*")) if not IGNORED & set(path.relative_to(ROOT).parts))
    return [path for path in found if path.is_file() and path.suffix in TEXT and path.stat().st_size < 2_000_000]


def test_no_paths_of_one_machine() -> None:
    """Nothing in the tree names a folder of somebody's machine or the host of a package registry."""
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if FOREIGN.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)


def test_tests_mirror_the_tree() -> None:
    """tests/kernels is about trdq_core/kernels, tests/studio about studio: one finds the tests of a room by its name."""
    strange = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        folder = path.parent.relative_to(ROOT / "tests")
        if folder.parts and folder.parts[0] in KINDS_OF_TESTS:
            continue
        if not ((ROOT / folder).is_dir() or (ROOT / "trdq_core" / folder).is_dir()):
            strange.append(str(folder))
    assert not strange, f"folders of tests without a room of that name: {', '.join(sorted(set(strange)))}"


def test_every_room_of_the_core_is_tested() -> None:
    """A test imports each module of the core, or one that imports it; a room counts by its folder."""
    core = ROOT / "trdq_core"
    rooms = [path for path in core.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    rooms = [path for path in rooms if not path.name.startswith("__")]
    tests = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    direct = [path for path in rooms if mentions(tests, path.stem)]
    behind = " ".join(path.read_text(encoding="utf-8") for path in direct if path.suffix == ".py")
    missing = sorted(path.stem for path in rooms if path not in direct and not mentions(behind, path.stem))
    assert not missing, f"no test comes near trdq_core.{', trdq_core.'.join(missing)}"


def mentions(source: str, name: str) -> bool:
    """Whether some import in `source` names the core's module or room `name`."""
    return bool(re.search(rf"trdq_core(\.| import ([^\n(]*\b|\([^)]*\b)){name}\b", source))
