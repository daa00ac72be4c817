"""The scorers of reasoning-gym's tasks, as a role of the sandbox: a process for each answer.

Some of these scorers evaluate the text that they are given as Python, and code that runs where its own score is
computed can make that score what it likes. So none of it runs: a text that they would evaluate must be a literal, or,
where sympy reads it, a formula.
"""

import ast
import functools
import json
import math
from collections.abc import Callable

import reasoning_gym  # optional, and slow (2 s): imported once, by the warm process
import sympy
import sympy.parsing.sympy_parser as sympy_parser
from reasoning_gym.algorithmic import binary_matrix, spiral_matrix, string_insertion
from reasoning_gym.games import n_queens

from feature_server.verifiers.sandbox import REFUSED

EVALUATING_MODULES = (binary_matrix, spiral_matrix, string_insertion, n_queens)
"""Those whose scorers call eval on the answer."""
FORMULA = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.Call, ast.Name, ast.Constant, ast.Tuple, ast.Load),
    *(ast.operator, ast.unaryop),
)
"""Syntax of a formula: no attribute, no index, no comparison, no function of its own."""


def make_readers_safe() -> None:
    """Replace, in this process, what the scorers evaluate with. Test: test_reasoning_gym.py"""
    for module in EVALUATING_MODULES:
        module.eval = ast.literal_eval  # hides the builtin from the module
    sympy_parser.eval_expr = evaluated_formula


def evaluated_formula(code: str, local_dict: dict[str, object], global_dict: dict[str, object]) -> object:
    """In place of sympy's function of the same arguments: the value of Python source that it made from a text.

    Raises: ValueError if the source is anything but a formula of sympy's own functions, symbols and numbers.
    """
    for node in ast.walk(ast.parse(code, mode="eval")):
        if not isinstance(node, FORMULA):
            raise ValueError(f"{type(node).__name__} is no part of a formula, in {code[:200]!r}")
        if isinstance(node, ast.Name) and not _is_mathematical(node.id, local_dict, global_dict):
            raise ValueError(f"{node.id!r} is no function, constant or variable of a formula, in {code[:200]!r}")
    return eval(code, global_dict, local_dict)


def _is_mathematical(name: str, local_dict: dict[str, object], global_dict: dict[str, object]) -> bool:
    """Whether the name is a value or a class of sympy's, or one of the few functions that make such values."""
    found = local_dict.get(name, global_dict.get(name))
    is_class = isinstance(found, type) and issubclass(found, sympy.Basic)
    return is_class or isinstance(found, sympy.Basic) or found in (sympy.sqrt, sympy.cbrt, abs)


make_readers_safe()


def score(text: str, reading: int, writing: int) -> bytes:
    """The role: `text` is [completion, answer] as JSON, the answer an entry of a reasoning-gym dataset as JSON.

    Its verdict has the score as detail; `failed` where the task's scorer raised. A detail that begins with `refused: `
    says that the answer is no such entry.
    """
    completion, answer = json.loads(text)
    try:
        scorer, entry = _scorer_and_entry(answer)
    except ValueError as error:
        return json.dumps(["failed", f"{REFUSED}{type(error).__name__}: {error}"]).encode()
    try:
        value = float(scorer(answer=completion.strip(), entry=entry))
    except Exception as error:  # noqa: BLE001  they parse the text as they like: what they raise means "no answer"
        return json.dumps(["failed", f"{type(error).__name__}: {error}"[:1000]]).encode()
    return json.dumps(["passed", repr(value)] if math.isfinite(value) else ["failed", repr(value)]).encode()


ROLES = (score,)

_scorer_of = functools.cache(reasoning_gym.get_score_answer_fn)


def _scorer_and_entry(answer: str) -> tuple[Callable[..., float], object]:
    entry = json.loads(answer)
    return _scorer_of(task_of(entry)), entry


def task_of(entry: object) -> str:
    """The name of the task, which reasoning-gym puts next to the question or into the metadata.

    Raises: ValueError if the entry is not one of reasoning-gym.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("metadata", {}), dict) or "answer" not in entry:
        raise ValueError(f"the answer must be a reasoning-gym entry as a JSON object, got {json.dumps(entry)[:200]}")
    fields = {**entry.get("metadata", {}), **entry}
    if "source_dataset" not in fields:
        raise ValueError(f"the reasoning-gym entry names no source_dataset, it has {sorted(fields)}")
    return fields["source_dataset"]
