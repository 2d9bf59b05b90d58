"""Who may import whom. The order stands in docs/architecture.md and is read from there, so the page cannot go stale."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("trdq_core", "studio")


def source_files() -> list[Path]:
    """Every module of the core, the studio and the two starting points."""
    found = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return [path for path in (*found, ROOT / "app.py") if path.exists()]


def module_of(path: Path) -> str:
    """trdq_core/nn/linear.py is trdq_core.nn.linear; a package's __init__ is the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in source_files()}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imports_of(name: str) -> set[str]:
    """Every module that `name` imports, at its top or inside functions; `from room import module` counts as the module."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in MODULES else base)
    return found


def import_order() -> dict[str, int]:
    """Position of each module or room in the list under "Import order" of docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"## Import order.*?```\w*\n(.*?)```", text, re.DOTALL)
    assert block, 'docs/architecture.md has no list under "## Import order"'
    lines = (line.split("#")[0] for line in block[1].splitlines())
    return {name: position for position, name in enumerate(word for line in lines for word in line.split())}


ORDER = import_order()


def room_of(module: str) -> str | None:
    """The listed name that covers `module`: itself, or the nearest listed package above it."""
    while module:
        if module in ORDER:
            return module
        module = module.rpartition(".")[0]
        if module in ROOMS:
            return None  # naming the two halves does not place what is in them
    return None


def top_of(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_place(name: str) -> None:
    """A new module is written into the order of docs/architecture.md, which is where one looks for it."""
    assert room_of(name), f"{name} stands nowhere in docs/architecture.md, Import order; add it where it belongs"


@pytest.mark.parametrize("name", [name for name in MODULES if room_of(name)])
def test_modules_import_only_what_stands_above(name: str) -> None:
    """Nothing reaches down: a room may import itself and what the list names before it."""
    own = room_of(name)
    below = [
        other
        for other in sorted(imports_of(name))
        if (room := room_of(other)) and room != own and ORDER[room] > ORDER[own]
    ]
    assert not below, f"{name} imports what stands below it: {', '.join(below)}"


@pytest.mark.parametrize("name", [name for name in MODULES if top_of(name) == "trdq_core"])
def test_core_knows_nothing_of_the_face(name: str) -> None:
    """The library works without a browser, and only its adapters know diffusers."""
    tops = {top_of(other) for other in imports_of(name)}
    forbidden = {"gradio", "plotly", "studio", "training", "benchmarks", "tests"}
    if not name.startswith("trdq_core.adapters"):
        forbidden |= {"diffusers", "transformers"}
    assert not tops & forbidden, f"{name} imports {', '.join(sorted(tops & forbidden))}"


@pytest.mark.parametrize("name", [name for name in MODULES if top_of(name) in ("studio", "app")])
def test_only_services_and_jobs_know_the_core(name: str) -> None:
    """Pages and components see the core through services; the studio never sees diffusers."""
    tops = {top_of(other) for other in imports_of(name)}
    forbidden = {"diffusers", "transformers", "training", "benchmarks", "tests"}
    if not name.startswith(("studio.services", "studio.jobs")):
        forbidden |= {"trdq_core"}
    assert not tops & forbidden, f"{name} imports {', '.join(sorted(tops & forbidden))}"


QUIET = (
    ast.Import,
    ast.ImportFrom,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Assign,
    ast.AnnAssign,
)
REGISTERING = re.compile(r"(^|[._])(register\w*|define|impl)$")


def acts_on_import(node: ast.stmt) -> bool:
    """Whether a top-level statement does something when its module is imported. Registration is allowed."""
    if isinstance(node, QUIET):
        return False
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return False  # a docstring
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return not REGISTERING.search(ast.unparse(node.value.func))
    if isinstance(node, ast.If):
        return "__main__" not in ast.unparse(node.test) and any(acts_on_import(inner) for inner in node.body)
    if isinstance(node, ast.Try):
        return any(acts_on_import(inner) for inner in (*node.body, *node.orelse, *node.finalbody))
    return True


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith(("app", "__main__"))])
def test_importing_does_nothing(name: str) -> None:
    """Importing defines and registers; it opens, prints, starts and changes nothing."""
    acting = [f"line {node.lineno}: {ast.unparse(node)[:60]}" for node in TREES[name].body if acts_on_import(node)]
    assert not acting, f"{name} acts when imported: {'; '.join(acting)}"


@pytest.mark.parametrize(
    "module", ["trdq_core", "trdq_core.cli", "trdq_core.presets", "trdq_core.runs", "trdq_core.terminal"]
)
def test_light_modules_stay_light(module: str) -> None:
    """What the command line's --help and the page's first paint need is there without torch or gradio."""
    heavy = ("torch", "gradio", "diffusers", "transformers", "plotly", "pandas")
    code = f"import sys, {module}; print(*[m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"importing {module} loads {done.stdout.strip()}"
