"""What the import contracts in pyproject.toml cannot say: calls, the time of an import, and names of files."""

import ast
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = PROJECT["tool"]["importlinter"]["root_packages"]
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
ENGINES = ("vllm", "deepspeed")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def files_with_formulas() -> list[Path]:
    """The files of the contract `formulas`, which names modules and whole rooms."""
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    (modules,) = [contract["source_modules"] for contract in contracts if contract["id"] == "formulas"]
    paths = [ROOT / module.replace(".", "/") for module in modules]
    return [path for place in paths for path in ([*place.glob("*.py")] or [place.with_suffix(".py")])]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_one_file_makes_ray_actors(path: Path) -> None:
    says_remote = re.search(r"\bray\.remote\b|\bfrom ray import\b.*\bremote\b", path.read_text(encoding="utf-8"))
    assert bool(says_remote) == (name_of(path) == "orchestration/cluster/cluster.py")


@pytest.mark.parametrize("path", files_with_formulas(), ids=name_of)
def test_formulas_neither_print_nor_open_files(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert calls.isdisjoint({"print", "open"})


def test_engines_are_imported_only_when_they_are_started() -> None:
    """A driver that imports an engine waits 10 s for it; a machine without it must still run these tests."""
    modules = [
        name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in FILES
        if path.parent.parent == ROOT
    ]
    code = f"""
import importlib, sys
for module in {modules!r}:
    importlib.import_module(module)
    found = [engine for engine in {ENGINES!r} if engine in sys.modules]
    assert not found, f"{{module}} imports {{found}}"
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_no_file_of_orchestration_hides_a_module_of_others() -> None:
    """`python orchestration/run.py` puts that folder in front of every other place that Python looks in."""
    project = PROJECT["project"]
    requirements = list(chain(project["dependencies"], *project["optional-dependencies"].values()))
    dependencies = {re.split(r"[^\w-]", requirement)[0].lower().replace("-", "_") for requirement in requirements}
    assert {"ray", "wandb", "torch", "vllm"} <= dependencies
    stems = {path.stem for path in (ROOT / "orchestration").glob("*.py")} - {"__init__"}
    assert stems.isdisjoint(sys.stdlib_module_names | dependencies | set(FOLDERS))


ROOMS = sorted({path.parent.relative_to(ROOT).as_posix() for path in FILES if path.parent.name != "embedded_model"})


@pytest.mark.parametrize("folder", ROOMS)
def test_importing_a_folder_runs_nothing(folder: str) -> None:
    tree = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) and len(tree.body) == 1


def test_every_test_file_runs_alone() -> None:
    """A test file is found by another only if both run together; what tests share is in tests/support."""
    importing = re.compile(r"^(?:from|import) test_\w+", re.MULTILINE)
    paths = [*(ROOT / "tests").rglob("*.py")]
    assert [name_of(path) for path in paths if importing.search(path.read_text(encoding="utf-8"))] == []
