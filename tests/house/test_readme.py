"""The documentation against the disk: the tree of docs/layout.md, every link and path, and every function it names."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from orchestration.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
LISTED = ("actors", "feature_server", "learner", "orchestration", "benchmarks", "docs")
"""Folders whose every file docs/layout.md names; of the others it names the folder."""
TOP = (*LISTED, "tests", "requirements")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "results" / "README.md",
    ROOT / "actors" / "models" / "embedded_model" / "MODEL_CARD.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PATH = re.compile(rf"(?<![\w/.-])((?:{'|'.join(TOP)})/[\w./-]*\.(?:py|toml|md|jsonl?|txt|svg|safetensors))\b")
EQUATIONS = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def tree_lines() -> Iterator[tuple[str, str]]:
    """Path from the root and phrase of each line of the layout's tree; a folder's path ends in a slash."""
    page = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    folders: list[str] = []
    for line in re.search(r"```\n(.*?)```", page, re.DOTALL).group(1).splitlines():
        name, phrase = line.split(maxsplit=1)
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        assert depth == 0 or folders[depth - 1].endswith("/"), f"{line!r} is inside a file"
        yield "".join(folders[: depth + 1]), phrase


def test_layout_names_every_file_with_a_phrase() -> None:
    lines = list(tree_lines())
    assert all(phrase.strip() for _, phrase in lines)
    paths = [path for path, _ in lines]
    assert len(set(paths)) == len(paths)
    on_disk = {
        path.relative_to(ROOT).as_posix() + ("/" if path.is_dir() else "")
        for top in LISTED
        for path in [ROOT / top, *(ROOT / top).rglob("*")]
        if path.name != "__init__.py" and "__pycache__" not in path.parts
    }
    assert set(paths) == on_disk | {f"{top}/" for top in TOP}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    links += [link for link in re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE) if not link.startswith("http")]
    for link in links:
        path, _, section = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link} does not exist"
        if section:
            assert section in anchors(target), f"{link}: no such heading"


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=named)
def test_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    assert not missing
    on_disk = {path.name for top in TOP for path in (ROOT / top).rglob("*.py")}
    unknown = [name for name in re.findall(r"`([\w]+\.py)\b", text) if name not in on_disk]
    assert not unknown


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=named)
def test_settings_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    sections = {name: tree for name, tree in sections.items() if isinstance(tree, type) and issubclass(tree, BaseModel)}
    of_a_section = rf"({'|'.join(sections)})((?:\.[a-z_]+)+)"
    keys = re.findall(rf"`{of_a_section}(?: = [^`]+)?`", text)
    keys += [(section, path.replace("-", "_")) for section, path in re.findall(r"--(\w+)((?:\.[a-z-]+)+)", text)]
    for section, path in keys:
        tree: object = sections.get(section)
        for name in path.split(".")[1:]:
            if tree is None:
                break  # a section of another command
            assert isinstance(tree, type) and issubclass(tree, BaseModel), f"{section}{path}"
            assert name in tree.model_fields, f"{section}{path} is no setting"
            tree = tree.model_fields[name].annotation


def test_the_index_lists_every_page_and_the_readme_links_to_it() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert sorted(re.findall(r"^\| \[[\w.]+\]\(([\w.]+)\) \| .+ \|$", index, re.MULTILINE)) == sorted(pages)
    assert "(docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_equation_table_names_functions_and_tests_that_exist() -> None:
    functions = re.findall(r"`([\w/]+\.py)::(\w+)`", EQUATIONS)
    tests = re.findall(r"`(test_\w+\.py)`", EQUATIONS)
    assert functions and tests
    for path, function in functions:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {function}\(", source, re.MULTILINE), (path, function)
    on_disk = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(tests) <= on_disk


def test_results_are_rows_and_each_file_has_its_command() -> None:
    results = ROOT / "benchmarks" / "results"
    commands = (results / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in results.glob("*.jsonl")}
    for name in files:
        rows = [json.loads(line) for line in (results / name).read_text(encoding="utf-8").splitlines()]
        assert rows and all(isinstance(row, dict) for row in rows), name
    assert set(re.findall(r"^\| `(\w+\.jsonl)` \|", commands, re.MULTILINE)) == files
    scripts = re.findall(r"`(\w+\.py)[ `]", commands)
    assert scripts and all((ROOT / "benchmarks" / script).exists() for script in scripts)


def test_citation_and_changelog_name_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{version}]\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
