"""Verifiers: a number for a whole completion, from its text and the answer that its document brings.

Guarantee: a verifier returns a finite number within its deadline, or raises. Code that a model wrote, and scorers that
read what it wrote as Python, run in the sandbox; however they end, that is a number and a count. A verifier of the
user's own that fails is an error of the run: a bug in a reward must not pass for a reward of 0.

Called by server.py, from several threads at once.
"""

import importlib.util
import json
import math
import re
import threading
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Protocol, runtime_checkable

from feature_server.config import VerifierConfig
from feature_server.verifiers.function_process import FunctionProcess
from feature_server.verifiers.sandbox import REFUSED, Result, Sandbox, program_sandbox

BUILT_IN = ("exact", "numeric", "unit_tests", "reasoning_gym")

NUMBER = re.compile(
    r"""
    (?: (?<! [\w)\]}] ) (?P<sign> [-+\u2212] ) )?            # a minus after a digit or a bracket subtracts: 10-3
    (?P<size> \d{1,3} (?:,\d{3})+ (?!\d) (?:\.\d+)?          # 1,234,567.89
            | \d++ / 0*+[1-9]\d*+ (?![.,]*\d)                # 3/4, but not the start of 3/4.5
            | (?: \d+ (?:\.\d+)? | \.\d+ ) (?: e[-+]?\d{1,3} (?!\d) )?  # 3, 3.14, .5, 1e-3
    )
    """,
    re.VERBOSE | re.ASCII | re.IGNORECASE,
)
MAX_DIGITS = 1000
"""Longest number that is read; a longer one is no plausible answer, and its exact value is slow to compute."""


@runtime_checkable
class Verifier(Protocol):
    """Scores one completion of one document."""

    status_counts: Counter[str]
    """Runs of confined code by how they ended: passed, failed, timeout, memory, forbidden, crashed."""

    def __call__(self, *, prompt: str, completion: str, answer: str) -> float:
        """The reward, a finite number. See `make_verifier` for what is raised."""
        ...


def make_verifier(config: VerifierConfig) -> Verifier:
    """The verifier of that name, ready to use.

    Raises: ValueError for a name that is unknown, for a function that cannot be imported, naming what was tried, and
    for limits under which no program runs; TimeoutError if importing the function took too long;
    ModuleNotFoundError with the command to run if reasoning-gym is not installed; RuntimeError if code cannot be
    confined on this machine.
    Its calls raise: ValueError if the user's function raised or returned no finite number, or if an answer is not what
    the verifier needs; TimeoutError if the user's function hung; ChildProcessError if it ended its process.
    Test: test_verifiers.py
    """
    if config.name == "exact":
        return TextVerifier(exact)
    if config.name == "numeric":
        return TextVerifier(numeric)
    if config.name == "unit_tests":
        return UnitTests(config)
    if config.name == "reasoning_gym":
        return ReasoningGym(config)
    module, _, function = config.name.rpartition(":")
    if not module or not function:
        raise ValueError(
            f"verifier.name={config.name!r} is unknown; choose {', '.join(BUILT_IN)}, or give a function of yours as "
            "package.module:function or path/to/file.py:function"
        )
    return OwnFunction(config)


def exact(completion: str, answer: str) -> bool:
    """Whether the texts are equal but for white space around them."""
    return completion.strip() == answer.strip()


def numeric(completion: str, answer: str) -> bool:
    """Whether the last numbers of the two texts are equal, exactly; False if a text has none.

    Test: test_verifiers.py::test_numbers_are_read_as_a_slow_reader_does
    """
    number = last_number(completion)
    return number is not None and number == last_number(answer)


def last_number(text: str) -> Fraction | None:
    """The exact value of the last number in the text: 1,234.5 or -3/4 or 1e-3; None if there is none.

    Commas separate thousands. A sign after a digit, a letter or a closing bracket is an operation's: 10-3 ends in 3.
    A fraction has whole numbers without commas, the lower one not 0; else its parts are two numbers.
    """
    found = list(NUMBER.finditer(text))
    if not found or len(found[-1]["size"]) > MAX_DIGITS:
        return None
    sign, size = found[-1]["sign"], Fraction(found[-1]["size"].replace(",", ""))
    return size if sign in (None, "+") else -size


class TextVerifier:
    """Compares completion and answer; runs nothing."""

    def __init__(self, agree: Callable[[str, str], bool]) -> None:
        self._agree = agree
        self.status_counts: Counter[str] = Counter()

    def __call__(self, *, prompt: str, completion: str, answer: str) -> float:
        """1 if they agree, else 0."""
        return float(self._agree(completion, answer))


class Confined:
    """Runs jobs in a sandbox with the limits of the configuration, and counts how they end."""

    def __init__(self, config: VerifierConfig, sandbox: Sandbox) -> None:
        self._config, self._sandbox = config, sandbox
        self._lock = threading.Lock()
        self.status_counts: Counter[str] = Counter()

    def run(self, *texts: str) -> Result:
        """How the job ended."""
        limits = self._config
        result = self._sandbox.run(*texts, timeout_s=limits.timeout_s, memory_mib=limits.memory_mib)
        with self._lock:
            self.status_counts[result.status] += 1
        return result


class UnitTests(Confined):
    """Runs prompt and completion as a program, and the answer as its tests."""

    def __init__(self, config: VerifierConfig) -> None:
        """Try an empty program, so that a machine or limits that cannot work are refused before the run."""
        super().__init__(config, program_sandbox())
        result = self.run("", "")
        if result.status != "passed":
            raise ValueError(
                f"not even an empty program passes with verifier.timeout_s={config.timeout_s} and verifier.memory_mib="
                f"{config.memory_mib}: {result.status}, {result.detail}; raise them"
            )
        self.status_counts.clear()

    def __call__(self, *, prompt: str, completion: str, answer: str) -> float:
        """1 if program and tests ran through, else 0, whatever went wrong."""
        return float(self.run(prompt + completion, answer).status == "passed")


class OwnFunction:
    """A function (prompt, completion, answer) -> number of the user's, in a process of its own."""

    def __init__(self, config: VerifierConfig) -> None:
        self._name = config.name
        self.status_counts: Counter[str] = Counter()
        try:
            self._function = FunctionProcess(config.name, timeout_s=config.timeout_s)
        except (ValueError, ChildProcessError) as error:
            raise ValueError(f"verifier.name={config.name!r} cannot be imported: {error}") from error

    def __call__(self, *, prompt: str, completion: str, answer: str) -> float:
        """What the function returned."""
        try:
            value = self._function(prompt, completion, answer)
        except (ValueError, TimeoutError, ChildProcessError) as error:
            raise type(error)(f"the verifier {error}\nThe completion was {completion!r}") from error
        if not math.isfinite(value):
            raise ValueError(f"the verifier {self._name} returned {value}. The completion was {completion!r}")
        return value


class ReasoningGym(Confined):
    """The scorer of the reasoning-gym task that the answer names, in the sandbox: some read completions as Python."""

    def __init__(self, config: VerifierConfig) -> None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ModuleNotFoundError(
                "verifier.name='reasoning_gym' needs the package reasoning-gym; run: pip install reasoning-gym==0.1.25"
            )
        super().__init__(config, Sandbox("feature_server.verifiers.reasoning_gym_scorer:ROLES", with_packages=True))

    def __call__(self, *, prompt: str, completion: str, answer: str) -> float:
        """The task's score in [0, 1]; 0 if its scorer raised, hung or died over this completion."""
        result = self.run(json.dumps([completion, answer]))
        if result.detail.startswith(REFUSED):
            raise ValueError(result.detail.removeprefix(REFUSED))
        return float(result.detail) if result.status == "passed" else 0.0
