"""Programming problems in the form of HumanEval: a prompt to complete, and a program that checks the result.

Reading and text only; whatever a model wrote is run by the caller, in the sandbox.
"""

import gzip
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path

TOP_LEVEL = re.compile(r"\n(?=[^\s)\]}])")
"""End of a line after which one starts without indentation; a closing bracket still belongs to what it closes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem (the field names are those of the file)."""

    task_id: str
    prompt: str
    """Imports, the signature and the docstring of a function."""
    entry_point: str
    """Name of that function."""
    canonical_solution: str
    """A body that is right."""
    test: str
    """Source that defines check(candidate), which raises if the candidate is wrong."""


def read_problems(path: Path) -> list[Problem]:
    """All problems of a .jsonl or .jsonl.gz file, in its order.

    Raises: ValueError naming the line that lacks a field or holds no JSON object, and for a repeated task_id.
    """
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        numbered = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
    problems = [_problem(line, place=f"{path}, line {number}") for number, line in numbered]
    if len({problem.task_id for problem in problems}) < len(problems) or not problems:
        raise ValueError(f"{path} holds {len(problems)} problems; each needs a task_id of its own, and one is needed")
    return problems


def _problem(line: str, *, place: str) -> Problem:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not valid JSON ({error}); each line must hold one problem") from error
    names = [field.name for field in fields(Problem)]
    missing = [n for n in names if not isinstance(record, dict) or not isinstance(record.get(n), str)]
    if missing:
        raise ValueError(f"{place}: {missing} must be strings, as in HumanEval; fix the line")
    return Problem(**{name: record[name] for name in names})


def function_body(completion: str) -> str:
    """The completion up to the next top-level statement: a base model continues with whatever may follow a function.

    What continues the prompt's last line always belongs to the body.
    """
    return TOP_LEVEL.split(completion, maxsplit=1)[0]


def program_and_tests(problem: Problem, *, prompt: str, completion: str) -> tuple[str, str]:
    """The program, and the tests that pass if it is right; `prompt` is the part of the problem's that the model saw."""
    tests = f"{problem.test}\n\ncheck({problem.entry_point})\n"
    return f"{prompt}{function_body(completion)}\n", tests
