"""Verifiers: numbers against a slow reader, programs and functions of every kind against what they must cost a run."""

import itertools
import random
import string
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import psutil
import pytest

from feature_server.config import VerifierConfig
from feature_server.verifiers.sandbox import Result, Sandbox
from feature_server.verifiers.verifiers import Verifier, last_number, make_verifier

ROOT = Path(__file__).resolve().parents[2]

JUDGE = '''
"""Returns what its completion names."""
import os, subprocess, sys, time
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

print("imported", flush=True)
calls = 0
constant = 3

@dataclass
class Seen:
    """Dataclasses look their module up."""
    calls: int = 0

def judge(prompt, completion, answer):
    global calls
    calls += 1
    print("noise", flush=True)
    kinds = {"int": 3, "bool": True, "float": 0.1, "numpy": np.float32(0.5), "fraction": Fraction(1, 4), "nan": np.nan}
    kinds |= {"inf": float("-inf"), "none": None, "text": "1.0", "array": np.ones(1), "calls": Seen(calls).calls}
    kinds |= {"pid": os.getpid(), "texts": len(prompt + completion + answer), "input": len(sys.stdin.read())}
    if completion == "raise": raise KeyError("missing")
    if completion == "exit": os._exit(3)
    if completion == "sys.exit": sys.exit("enough")
    if completion == "hang":
        subprocess.Popen(["/bin/sleep", f"60.{os.getpid()}"])
        while True: time.sleep(1)
    return kinds[completion.strip()]
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    return own_verifier(tmp_path_factory.mktemp("own"), timeout_s=60)


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Verifier:
    """The same function, which has a second: for completions that hang."""
    return own_verifier(tmp_path_factory.mktemp("hasty"), timeout_s=1)


def own_verifier(folder: Path, *, timeout_s: float) -> Verifier:
    path = folder / "types.py"  # the name of a module that everything imports
    path.write_text(JUDGE, encoding="utf-8")
    return make_verifier(VerifierConfig(name=f"{path}:judge", timeout_s=timeout_s))


def reward(verifier: Verifier, completion: str, *, prompt: str = "", answer: str = "") -> float:
    return verifier(prompt=prompt, completion=completion, answer=answer)


def test_exact_compares_texts_without_the_space_around_them() -> None:
    verifier = make_verifier(VerifierConfig(name="exact"))
    assert reward(verifier, " a b\n", answer="a b") == 1
    assert reward(verifier, "a  b", answer="a b") == reward(verifier, "A b", answer="a b") == 0


NUMBERS = {
    "3\n": Fraction(3),
    "#### 42": Fraction(42),
    "The answer is 5.": Fraction(5),
    "costs $1,234,567.50 today": Fraction(2469135, 2),
    "-7": Fraction(-7),
    "\u22127": Fraction(-7),
    "+7": Fraction(7),
    "x=-7": Fraction(-7),
    "10-7": Fraction(7),
    "f(x)-7": Fraction(7),
    "10 - 7": Fraction(7),
    "10 -7": Fraction(-7),
    "3.25": Fraction(13, 4),
    "-.5": Fraction(-1, 2),
    "1e-3": Fraction(1, 1000),
    "2.5E+2": Fraction(250),
    "1e1234": Fraction(1234),
    "6/8": Fraction(3, 4),
    "-6/8.": Fraction(-3, 4),
    "3/0": Fraction(0),
    "3/4.5": Fraction(9, 2),
    "50%": Fraction(50),
    "1, 2, 3": Fraction(3),
    "1,23": Fraction(23),
    "007": Fraction(7),
    "3eggs": Fraction(3),
    "": None,
    "none, nan, inf, -, . and ,": None,
    "٣": None,
    "9" * 1001: None,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_last_number(text: str) -> None:
    assert last_number(text) == NUMBERS[text]


def test_numeric_compares_exactly() -> None:
    verifier = make_verifier(VerifierConfig(name="numeric"))
    assert reward(verifier, "so 1 + 2 = 3\n", answer="Step 1.\n#### 3") == 1
    assert reward(verifier, "0.5", answer="1/2") == reward(verifier, "1,000", answer="1e3") == 1
    assert reward(verifier, "0.30000000000000004", answer="0.3") == 0
    assert reward(verifier, "10000000000000001", answer="1e16") == 0
    assert reward(verifier, "no number", answer="3") == reward(verifier, "no number", answer="none") == 0


DIGITS = set(string.digits)


def all_digits(text: str) -> bool:
    return bool(text) and set(text) <= DIGITS


def slow_mantissa(text: str) -> Fraction | None:
    """3 or 3.14 or .5"""
    whole, dot, decimals = text.partition(".")
    if (dot and not all_digits(decimals)) or (whole and not all_digits(whole)) or not (whole or decimals):
        return None
    value = Fraction(0)
    for digit in whole + decimals:
        value = 10 * value + int(digit)
    for _ in decimals:
        value /= 10
    return value


def slow_thousands(text: str, rest: str) -> Fraction | None:
    whole, dot, decimals = text.partition(".")
    first, *groups = whole.split(",")
    if not groups or not all_digits(first) or len(first) > 3 or not all(all_digits(g) and len(g) == 3 for g in groups):
        return None
    return slow_mantissa(whole.replace(",", "") + dot + decimals) if dot or rest[:1] not in DIGITS else None


def slow_fraction(text: str, rest: str) -> Fraction | None:
    over, slash, under = text.partition("/")
    if not slash or not all_digits(over) or not all_digits(under) or set(under) == {"0"}:
        return None
    return slow_mantissa(over) / slow_mantissa(under) if rest.lstrip(".,")[:1] not in DIGITS else None


def slow_decimal(text: str, rest: str) -> Fraction | None:
    mantissa, e, exponent = text.replace("E", "e").partition("e")
    value = slow_mantissa(mantissa)
    if value is None or not e:
        return value
    size = exponent[1:] if exponent[:1] in ("+", "-") else exponent
    if not all_digits(size) or len(size) > 3 or rest[:1] in DIGITS:
        return None
    for _ in range(int(size)):
        value = value / 10 if exponent[0] == "-" else value * 10
    return value


def slow_size(text: str) -> tuple[int, Fraction | None]:
    """The longest number that starts the text, in the first of three notations that has one, and its length."""
    for notation in (slow_thousands, slow_fraction, slow_decimal):
        for end in range(len(text), 0, -1):
            value = notation(text[:end], text[end:])
            if value is not None:
                return end, value
    return 0, None


def slow_last_number(text: str) -> Fraction | None:
    at, last = 0, None
    while at < len(text):
        signed = text[at] in "+-\u2212" and (
            at == 0 or text[at - 1] not in string.ascii_letters + string.digits + "_)]}"
        )
        length, value = slow_size(text[at + signed :])
        if length:
            last = -value if signed and text[at] != "+" else value
        at += length + signed if length else 1
    return last


def test_numbers_are_read_as_a_slow_reader_does() -> None:
    for length in range(5):
        for letters in itertools.product("10,.-/e", repeat=length):
            text = "".join(letters)
            assert last_number(text) == slow_last_number(text), text
    letters = random.Random(0)
    for _ in range(1500):
        text = "".join(letters.choices("0123456789,,..//-+\u2212eE x)", k=letters.randrange(15)))
        assert last_number(text) == slow_last_number(text), text


@pytest.mark.parametrize("piece", ["1", "1/", "1,", ",111", ".1", "1e", "-", "1.", "2.2.2/"])
def test_long_texts_are_read_in_little_time(piece: str) -> None:
    start = time.process_time()
    last_number(piece * 20_000)
    last_number("1/2" + piece * 20_000)
    assert time.process_time() - start < 1


def test_unit_tests_reward_programs_that_run_through() -> None:
    verifier = make_verifier(VerifierConfig(name="unit_tests", memory_mib=128))
    prompt, answer = "def double(x):\n", "assert double(3) == 6\nassert double('a') == 'aa'"
    completions = {
        "    return 2 * x": "passed",
        "    return 2 * x\n\ndef triple(": "failed",
        "    return x + 3": "failed",
        "    return [0] * 10**9": "memory",
        "    open('x', 'w')": "forbidden",
        "    exit(0)": "failed",
        "    import os; os._exit(0)": "crashed",
        "    return 2 * x\nimport sys; sys.exit()": "crashed",
    }
    for number, (completion, status) in enumerate(completions.items(), 1):
        counted = verifier.status_counts[status]
        assert reward(verifier, completion, prompt=prompt, answer=answer) == (status == "passed")
        assert verifier.status_counts[status] == counted + 1
        assert verifier.status_counts.total() == number
    hasty = make_verifier(VerifierConfig(name="unit_tests", timeout_s=2))
    assert reward(hasty, "    while True: pass", prompt=prompt, answer=answer) == 0
    assert hasty.status_counts == {"timeout": 1}


def test_limits_under_which_nothing_runs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty program is over so soon that no real limit stops it every time."""

    def run(self: Sandbox, *texts: str, timeout_s: float, memory_mib: int) -> Result:
        assert texts == ("", "")
        return Result(status="timeout", detail=f"ran for {timeout_s} s")

    monkeypatch.setattr(Sandbox, "run", run)
    with pytest.raises(ValueError, match=r"not even an empty program passes with verifier.timeout_s=0.001 .*timeout"):
        make_verifier(VerifierConfig(name="unit_tests", timeout_s=0.001))


def test_a_function_of_the_users_is_called_with_three_texts(own: Verifier) -> None:
    for kind, value in {"int": 3, "bool": 1, "float": 0.1, "numpy": 0.5, "fraction": 0.25}.items():
        assert reward(own, kind) == value
    assert reward(own, "texts", prompt="größer", answer="\ud800" * 100_000) == 6 + 5 + 100_000
    assert reward(own, "input") == 0
    assert reward(own, "calls") + 1 == reward(own, "calls"), "one process scores all"


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("raise", ValueError, "KeyError: 'missing'"),
        ("nan", ValueError, "returned nan"),
        ("inf", ValueError, "returned -inf"),
        ("none", ValueError, "returned None, which is not a number"),
        ("text", ValueError, "returned '1.0', which is not a number"),
        ("array", ValueError, "returned array([1.]), which is not a number"),
        ("exit", ChildProcessError, "ended its process (exit code 3)"),
        ("sys.exit", ChildProcessError, "ended its process (exit code 1)"),
        ("hang", TimeoutError, "was not done after 1.0 s"),
    ],
)
def test_a_function_of_the_users_that_fails_is_no_reward_of_0(
    own: Verifier, hasty: Verifier, kind: str, error: type[Exception], message: str
) -> None:
    verifier = hasty if kind == "hang" else own
    with pytest.raises(error) as raised:
        reward(verifier, kind)
    assert message in str(raised.value)
    assert "types.py:judge" in str(raised.value) and f"completion was '{kind}'" in str(raised.value)
    assert reward(verifier, "int") == 3, "the next completion is scored again"


def test_a_function_that_hangs_is_ended_with_all_it_started(hasty: Verifier) -> None:
    process = psutil.Process(int(reward(hasty, "pid")))
    with pytest.raises(TimeoutError):
        reward(hasty, "hang")
    assert not process.is_running()
    its_child = ["/bin/sleep", f"60.{process.pid}"]
    left = [other for other in psutil.process_iter(["cmdline"]) if other.info["cmdline"] == its_child]
    _, alive = psutil.wait_procs(left, timeout=30)  # killed already; the kernel may still be at it
    assert not alive


LEAVING_CHILDREN = {
    "a child": "subprocess.Popen(SLEEP)",
    "a child in a session of its own": "subprocess.Popen(SLEEP, start_new_session=True)",
    "a child of a shell that ended": "subprocess.run(['/bin/sh', '-c', 'setsid sleep ' + SLEEP[1] + ' & exit'])",
    "a daemon": """
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.closerange(0, 100)
            os.execv(SLEEP[0], SLEEP)
        os._exit(0)
    os.wait()""",
    "a child that ignores signals": "subprocess.Popen(['/bin/sh', '-c', 'trap : HUP INT TERM; sleep ' + SLEEP[1]])",
}


@pytest.mark.parametrize("kind", LEAVING_CHILDREN)
@pytest.mark.parametrize("end", ["dropped", "hangs", "exits"])
def test_everything_that_a_function_started_ends_with_it(kind: str, end: str, tmp_path: Path) -> None:
    seconds = f"60{random.randrange(10**6):06}.5"
    then = {"dropped": "return 1.0", "hangs": "time.sleep(1000)", "exits": "os._exit(3)"}[end]
    body = f"import os, subprocess, time\nSLEEP = ['/bin/sleep', '{seconds}']\ndef judge(*_):\n"
    body += f"    {LEAVING_CHILDREN[kind].strip()}\n    open({str(tmp_path / 'begun')!r}, 'w').close()\n    {then}\n"
    (tmp_path / "leaving.py").write_text(body, encoding="utf-8")
    verifier = make_verifier(VerifierConfig(name=f"{tmp_path}/leaving.py:judge", timeout_s=2))
    if end == "dropped":
        assert reward(verifier, "") == 1
        wait_for(lambda: bool(sleeping(seconds)))  # between two calls, what it started may go on
        del verifier
    else:
        with pytest.raises((TimeoutError, ChildProcessError)):
            reward(verifier, "")
    assert (tmp_path / "begun").exists()
    assert not sleeping(seconds)


def sleeping(seconds: str) -> list[psutil.Process]:
    return [one for one in psutil.process_iter(["cmdline"]) if seconds in (one.info["cmdline"] or [])]


def test_a_killed_run_leaves_nothing_that_a_function_started(tmp_path: Path) -> None:
    seconds = f"60{random.randrange(10**6):06}.5"
    body = "import subprocess, time\ndef judge(*_):\n"
    body += f"    subprocess.Popen(['/bin/sleep', '{seconds}'], start_new_session=True)\n    time.sleep(1000)\n"
    (tmp_path / "leaving.py").write_text(body, encoding="utf-8")
    imported = "from feature_server.verifiers.function_process import FunctionProcess"
    program = f"{imported}\nFunctionProcess('{tmp_path}/leaving.py:judge', timeout_s=600.0)('')"
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) as parent:
        wait_for(lambda: bool(sleeping(seconds)))
        parent.kill()
    wait_for(lambda: not sleeping(seconds))


def test_a_verifier_that_is_dropped_takes_its_process_along() -> None:
    before = set(psutil.Process().children())
    verifier = make_verifier(VerifierConfig(name="operator:concat"))
    (process,) = set(psutil.Process().children()) - before
    assert verifier.status_counts.total() == 0
    del verifier
    assert not process.is_running()


def test_a_killed_run_leaves_no_function_behind(tmp_path: Path) -> None:
    """Neither one that waits for a completion nor one that hangs over it."""
    judge = f"import time\ndef judge(*_):\n    open({str(tmp_path / 'begun')!r}, 'w').close()\n    time.sleep(1000)"
    (tmp_path / "slow.py").write_text(judge, encoding="utf-8")
    program = f"""
from feature_server.verifiers.function_process import FunctionProcess
idle, busy = [FunctionProcess("{tmp_path}/slow.py:judge", timeout_s=0.5) for _ in range(2)]
print("ready", flush=True)
input()
busy("")
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "ready\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        parent.stdin.write("\n")
        parent.stdin.flush()
        wait_for((tmp_path / "begun").exists)
        parent.kill()
    assert len(children) == 4, "two keepers and two that call"
    wait_for(lambda: all(has_ended(child) for child in children))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exactly", ("exact, numeric, unit_tests, reasoning_gym", "package.module:function")),
        (":function", ("is unknown",)),
        ("no.such.module:judge", ("ModuleNotFoundError: No module named 'no'",)),
        ("/no/such/file.py:judge", ("FileNotFoundError", "/no/such/file.py")),
        ("OWN:absent", ("AttributeError", "absent")),
        ("OWN:constant", ("TypeError: constant is 3, which cannot be called",)),
        ("BROKEN:judge", ("SyntaxError",)),
        ("LEAVING:judge", ("ended its process (exit code 4)",)),
    ],
)
def test_a_verifier_that_cannot_be_used_is_refused_at_once(name: str, words: tuple[str, ...], tmp_path: Path) -> None:
    for file, source in {"OWN": JUDGE, "BROKEN": "def", "LEAVING": "import os; os._exit(4)"}.items():
        (tmp_path / f"{file}.py").write_text(source, encoding="utf-8")
        name = name.replace(file, str(tmp_path / f"{file}.py"))
    with pytest.raises(ValueError) as error:
        make_verifier(VerifierConfig(name=name))
    assert f"verifier.name={name!r}" in str(error.value)
    assert all(word in str(error.value) for word in words)
