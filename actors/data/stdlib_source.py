"""The embedded default texts: source code of the running interpreter's standard library.

Files are read, for pairs also parsed; nothing is imported or executed, and nothing is fetched. What distributions strip
(test packages), generate at build time or add (installed packages) is left out, so that machines with one
Python version see nearly the same texts.
"""

import ast
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from actors.data.texts import Pair, Text, content_place, hash_fraction

_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests"}
    | {"idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings"}
)
_BUILD_PREFIXES = ("config-", "_sysconfigdata")
_TKINTER_PAIRS_PER_OTHERS = 19  # one in 20 pairs at most: its wrappers are many and all alike

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def stdlib_files() -> list[Text]:
    """Whole .py files in the order of their names (paths relative to the standard library, with `/`).

    Files that are empty or do not decode are left out.
    """
    return list(_files())


def stdlib_pairs() -> list[Pair]:
    """Prompt (decorators, signature, docstring) and completion (body) of every documented function, dedented.

    The prompt ends with the docstring's last character; the line break and indentation after it open the
    completion, and `prompt + completion` is the function's source. Ordered by file and line; names are
    `path::qualname:line`. All pairs of a file share its split. At most one pair in 20 is tkinter's. Files that do not
    parse have none.
    """
    pairs: list[Pair] = []
    tkinter: list[Pair] = []
    for file in _files():
        try:
            tree = ast.parse(file.text)
        except (SyntaxError, ValueError):
            continue
        lines, place = file.text.split("\n"), content_place(file.text)
        found = (_pair(file.name, qualname, node, lines, place) for qualname, node in _functions(tree, prefix=""))
        (tkinter if file.name.startswith("tkinter/") else pairs).extend(pair for pair in found if pair is not None)
    tkinter.sort(key=lambda pair: hash_fraction(pair.name))
    pairs += tkinter[: len(pairs) // _TKINTER_PAIRS_PER_OTHERS]
    return sorted(pairs, key=_file_and_line)


def _files() -> Iterator[Text]:
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    for name in names:
        parts = name.split("/")
        if _SKIPPED_FOLDERS.intersection(parts) or parts[0].startswith(_BUILD_PREFIXES):
            continue
        try:
            with tokenize.open(root / name) as file:  # honours the encoding that the file declares
                text = file.read()
        except (SyntaxError, ValueError):  # of the declared encoding, and of bytes that it does not have
            continue
        if text.strip():
            yield Text(name=name, text=text)


def _functions(node: ast.AST, *, prefix: str) -> Iterator[tuple[str, _Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Function):
            yield prefix + child.name, child
            yield from _functions(child, prefix=f"{prefix}{child.name}.<locals>.")
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, prefix=f"{prefix}{child.name}.")
        elif not isinstance(child, ast.expr):
            yield from _functions(child, prefix=prefix)


def _pair(path: str, qualname: str, node: _Function, lines: list[str], file_place: float) -> Pair | None:
    """None without a docstring, without a body, or when both share a line."""
    docstring = node.body[0]
    if ast.get_docstring(node, clean=False) is None or len(node.body) == 1:
        return None
    assert docstring.end_lineno is not None and docstring.end_col_offset is not None  # the parser knows both
    if node.body[1].lineno == docstring.end_lineno:
        return None
    first = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
    indent = lines[node.lineno - 1][: node.col_offset]
    source = [line.removeprefix(indent) for line in lines[first - 1 : node.end_lineno]]
    last = docstring.end_lineno - first
    # ast counts columns in UTF-8 bytes; the docstring's last line loses its indentation with the others.
    line_bytes = lines[docstring.end_lineno - 1].encode()
    after = line_bytes[docstring.end_col_offset :].decode()
    prompt = "\n".join([*source[:last], source[last].removesuffix(after)]).rstrip()
    return Pair(
        name=f"{path}::{qualname}:{node.lineno}",
        prompt=prompt,
        completion="\n".join(source)[len(prompt) :],
        file_place=file_place,
    )


def _file_and_line(pair: Pair) -> tuple[str, int]:
    path, _, rest = pair.name.partition("::")
    return path, int(rest.rpartition(":")[2])
