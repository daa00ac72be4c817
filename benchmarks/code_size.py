"""How large the code is, room by room: `python benchmarks/code_size.py [--root CHECKOUT]`.

Counts Python files, lines, functions over 40 lines (docstrings and blank lines included) and the longest one of each
folder below the four packages; the median file and function; lines of the README; and test functions.
"""

import argparse
import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("actors", "feature_server", "learner", "orchestration")
LONG = 40
"""Lines of a function above which it is counted as long."""


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and lines of every function in a file, methods and nested ones included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def row(name: str, files: list[Path]) -> str:
    """One line of the table."""
    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in files]
    lengths = [(size, function) for path in files for function, size in functions(path)]
    long = sum(size > LONG for size, _ in lengths)
    size, function = max(lengths, default=(0, "-"))
    return f"| {name} | {len(files)} | {sum(lines)} | {max(lines)} | {long} | {function} ({size}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    root = parser.parse_args().root
    print("| room | files | lines | longest file | functions over 40 lines | longest function (lines) |")
    print("| --- | --- | --- | --- | --- | --- |")
    everything: list[Path] = []
    for package in PACKAGES:
        rooms: dict[Path, list[Path]] = {}
        for path in sorted((root / package).rglob("*.py")):
            if path.read_text(encoding="utf-8").strip() and path.name != "__init__.py":
                rooms.setdefault(path.parent, []).append(path)
        for folder, files in sorted(rooms.items()):
            print(row(f"{folder.relative_to(root)}/", files))
            everything += files
    print(row("all four packages", everything))
    sizes = [len(path.read_text(encoding="utf-8").splitlines()) for path in everything]
    lengths = [size for path in everything for _, size in functions(path)]
    tests = [name for path in (root / "tests").rglob("*.py") for name, _ in functions(path) if name.startswith("test_")]
    readme = len((root / "README.md").read_text(encoding="utf-8").splitlines())
    print(f"median file {statistics.median(sizes):.0f} lines, median function {statistics.median(lengths):.0f} lines,")
    print(f"README {readme} lines, {len(tests)} test functions in {len(list((root / 'tests').rglob('*.py')))} files")


if __name__ == "__main__":
    main()
