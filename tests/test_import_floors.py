"""Who may import whom: data runs actors -> feature_server -> learner, imports run the other way, Ray stays on top."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "actors": {"actors"},
    "feature_server": {"actors", "feature_server"},
    "learner": {"actors", "feature_server", "learner"},
    "orchestration": {"actors", "feature_server", "learner", "orchestration"},
}
"""Folder -> folders of this project that it may know."""

PURE = [
    "actors/data/blocks.py",
    "feature_server/features/pooling.py",
    "feature_server/features/gram.py",
    "feature_server/packing.py",
    "feature_server/features/pooled_whitening.py",
    "learner/objective/advantage.py",
    "learner/logprobs.py",
    "learner/loss.py",
    "learner/objective/off_policy.py",
    "learner/objective/parity.py",
    "learner/objective/reward.py",
    "learner/objective/whitening.py",
    "orchestration/evaluation/intervals.py",
    "orchestration/evaluation/pass_at_k.py",
    "orchestration/simulator/stage_times.py",
]
"""Files that hold formulas: tensors and numbers in, tensors and numbers out."""

ENGINES = ("vllm", "deepspeed")
FILES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Full names of everything imported in the file, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_levels(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_against_the_data(path: Path) -> None:
    of_this_project = top_levels(path) & set(MAY_IMPORT)
    assert of_this_project <= MAY_IMPORT[path.relative_to(ROOT).parts[0]]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_ray_stays_in_orchestration(path: Path) -> None:
    if path.is_relative_to(ROOT / "orchestration"):
        remote = re.search(r"\bray\.remote\b", path.read_text(encoding="utf-8"))
        assert bool(remote) == (path.name == "cluster.py"), "cluster.py alone says ray.remote"
        assert "ray.remote" not in imports(path)
    else:
        assert "ray" not in top_levels(path)


@pytest.mark.parametrize("name", PURE)
def test_formulas_know_neither_configuration_nor_logging(name: str) -> None:
    path = ROOT / name
    assert top_levels(path).isdisjoint({"logging", "os", "ray", "pydantic", *ENGINES})
    assert not [imported for imported in imports(path) if re.search(r"\bconfig\b", imported)]
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
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = list(chain(project["dependencies"], *project["optional-dependencies"].values()))
    dependencies = {re.split(r"[^\w-]", requirement)[0].lower().replace("-", "_") for requirement in requirements}
    assert {"ray", "wandb", "torch", "vllm"} <= dependencies
    stems = {path.stem for path in (ROOT / "orchestration").glob("*.py")} - {"__init__"}
    assert stems.isdisjoint(sys.stdlib_module_names | dependencies | set(MAY_IMPORT))


ROOMS = sorted({path.parent.relative_to(ROOT).as_posix() for path in FILES if path.parent.name != "embedded_model"})


@pytest.mark.parametrize("folder", ROOMS)
def test_importing_a_folder_runs_nothing(folder: str) -> None:
    tree = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) and len(tree.body) == 1
