"""Small changes of a source, one at a time, each still Python (pure). `check.py` runs tests against them."""

import ast
import itertools
from collections.abc import Iterator
from typing import NamedTuple

OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.USub: ("-", ""),
    ast.Not: ("not", ""),
    ast.Invert: ("~", ""),
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
METHODS = NAMES | {"sum": "mean", "mean": "sum", "argmax": "argmin", "argmin": "argmax"}
NOT_CODE = ("annotation", "returns", "decorator_list")
"""Fields of a node that are left as they are."""


class Edit(NamedTuple):
    """Bytes start..end of a source, replaced."""

    start: int
    end: int
    text: str


class Mutant(NamedTuple):
    """One edited source."""

    line: int
    before: str
    after: str
    """The line of the edit and what became of it, without indentation."""
    source: bytes


class Source:
    """A parsed file whose nodes know their place in bytes."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.tree = ast.parse(source)
        self._line_starts = [0, *itertools.accumulate(len(line) for line in source.splitlines(keepends=True))]

    def start(self, node: ast.AST) -> int:
        """First byte of a node."""
        return self._line_starts[node.lineno - 1] + node.col_offset

    def end(self, node: ast.AST) -> int:
        """First byte after a node."""
        return self._line_starts[node.end_lineno - 1] + node.end_col_offset

    def nodes(self) -> Iterator[ast.AST]:
        """All that runs and has a place: no annotations, and no f-strings, in which Python 3.11 places nothing."""
        waiting: list[ast.AST] = [self.tree]
        while waiting:
            node = waiting.pop()
            yield node
            if _number(node) is not None:
                continue
            for name, value in ast.iter_fields(node):
                children = value if isinstance(value, list) else [value]
                if name not in NOT_CODE:
                    waiting += [c for c in children if isinstance(c, ast.AST) and not isinstance(c, ast.JoinedStr)]

    def mutant(self, edit: Edit) -> Mutant:
        """The source after an edit."""
        edited = self.source[: edit.start] + edit.text.encode() + self.source[edit.end :]
        line = self.source.count(b"\n", 0, edit.start)
        last = self.source.count(b"\n", 0, edit.end)
        removed = last - line - edit.text.count("\n")

        def shown(source: bytes, last: int) -> str:
            return " ".join(part.strip() for part in source.decode().splitlines()[line : last + 1])

        return Mutant(line + 1, shown(self.source, last), shown(edited, last - removed), edited)


def mutants_of(source: bytes) -> list[Mutant]:
    """Every mutant, in the order of the file.

    Raises: SyntaxError if an edit made something that is no Python.
    """
    parsed = Source(source)
    edits = {edit for node in parsed.nodes() for edit in _edits(parsed, node)}
    mutants = [parsed.mutant(edit) for edit in sorted(edits)]
    for mutant in mutants:
        ast.parse(mutant.source)
    return mutants


def _edits(parsed: Source, node: ast.AST) -> Iterator[Edit]:
    """All edits at one node; those of its children come with the children."""
    if (number := _number(node)) is not None:
        yield Edit(parsed.start(node), parsed.end(node), repr(number + 1))
        return
    match node:
        case ast.BinOp():
            yield from _between(parsed, [node.left, node.right], [node.op])
        case ast.BoolOp():
            yield from _between(parsed, node.values, [node.op] * (len(node.values) - 1))
        case ast.Compare():
            yield from _between(parsed, [node.left, *node.comparators], node.ops)
        case ast.UnaryOp() if type(node.op) in OPERATORS:
            old, new = OPERATORS[type(node.op)]
            yield Edit(parsed.start(node), parsed.start(node) + len(old), new)
        case ast.Slice():
            yield from _one_more(parsed, [bound for bound in (node.lower, node.upper) if bound])
        case ast.If(test=ast.Call() | ast.Name() | ast.Attribute()):
            yield Edit(parsed.start(node.test), parsed.start(node.test), "not ")
        case ast.Expr(value=ast.Call()):
            yield Edit(parsed.start(node), parsed.end(node), "pass")
        case ast.Call():
            yield from _call_edits(parsed, node)


def _call_edits(parsed: Source, call: ast.Call) -> Iterator[Edit]:
    """Another function, another keyword, a wider range, a gradient let through."""
    function = call.func
    if isinstance(function, ast.Name) and function.id in NAMES:
        yield Edit(parsed.start(function), parsed.end(function), NAMES[function.id])
    if isinstance(function, ast.Attribute) and function.attr in METHODS:
        yield Edit(parsed.end(function) - len(function.attr), parsed.end(function), METHODS[function.attr])
    if isinstance(function, ast.Attribute) and function.attr == "detach":
        yield Edit(parsed.end(function.value), parsed.end(call), "")
    if ast.unparse(function).rpartition(".")[2] in ("range", "arange"):
        yield from _one_more(parsed, call.args)
    for keyword in call.keywords:
        if keyword.arg in ("min", "max"):
            yield Edit(parsed.start(keyword), parsed.start(keyword) + len(keyword.arg), NAMES[keyword.arg])


def _between(parsed: Source, operands: list[ast.expr], operators: list[ast.AST]) -> Iterator[Edit]:
    """The operators between operands, each exchanged for its counterpart."""
    for (left, right), operator in zip(itertools.pairwise(operands), operators, strict=True):
        if type(operator) in OPERATORS:
            old, new = OPERATORS[type(operator)]
            start = parsed.source.index(old.encode(), parsed.end(left), parsed.start(right))
            yield Edit(start, start + len(old), new)


def _one_more(parsed: Source, bounds: list[ast.expr]) -> Iterator[Edit]:
    """Bounds one further on; numbers among them are edited as numbers."""
    for bound in bounds:
        if _number(bound) is None and not isinstance(bound, ast.Starred):
            yield Edit(parsed.end(bound), parsed.end(bound), " + 1")


def _number(node: ast.AST) -> int | float | None:
    """The value of a literal number, with its sign: -1 as an axis becomes 0, not 1."""
    match node:
        case ast.Constant(value=bool()):
            return None
        case ast.Constant(value=int() | float()):
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
            return -node.operand.value
    return None
