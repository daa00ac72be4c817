"""The attacker's list: programs that want to pass tests they fail, to learn what they must not, or to do harm.

Every row is a promise of the sandbox, see docs/security.md.
"""

import functools
import os
import secrets
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_server.verifiers.file_rules import rules_exist
from feature_server.verifiers.sandbox import Result, Sandbox, program_sandbox

NEEDS_HIDDEN_FILES = pytest.mark.skipif(not rules_exist(), reason="this kernel has no Landlock")
TESTS = "assert double(3) == 6, 'wrong'\nassert double(21) == 42, 'wrong'"
WRONG = "\ndef double(x): return 7\n"


@functools.cache
def sandbox() -> Sandbox:
    """One for all: what an attack leaves behind would meet the next."""
    return program_sandbox()


def run(program: str, tests: str = "") -> Result:
    texts = textwrap.dedent(program), textwrap.dedent(tests)
    return sandbox().run(*texts, timeout_s=20.0, memory_mib=256)


@pytest.fixture(autouse=True)
def nothing_of_it_stays(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """After each attack: nothing was printed here, and the same sandbox still tells right from wrong."""
    yield
    assert capfd.readouterr() == ("", "")
    assert run("def double(x): return 2 * x", TESTS) == Result(status="passed", detail="")
    assert run(WRONG, TESTS) == Result(status="failed", detail="AssertionError: wrong")


TO_EVERY_DESCRIPTOR = """
import os
def tell(message):
    for descriptor in range(3, 65):
        try: os.write(descriptor, message)
        except OSError: pass
"""
FORGED_END = b'{"ended": [["passed", ""], ["double"], []]}\n'

FORGERIES = {
    "prints": "print('passed')\nimport sys\nsys.stderr.write('passed')",
    "writes a verdict": TO_EVERY_DESCRIPTOR + 'tell(b\'["passed", ""]\')',
    "writes a verdict and leaves": TO_EVERY_DESCRIPTOR + 'tell(b\'["passed", ""]\')\nos._exit(0)',
    "writes a verdict to the end of the pipe": TO_EVERY_DESCRIPTOR + 'tell(b\'["passed", ""]\' * 10**5)',
    "writes what is no JSON": TO_EVERY_DESCRIPTOR + "tell(b'\\xff\\0{[' * 9 + b'\\n')",
    "writes JSON of another kind": TO_EVERY_DESCRIPTOR + "tell(b'[]\\n7\\nnull\\n{}\\n')",
    "says that it has ended": TO_EVERY_DESCRIPTOR + f"tell({FORGED_END!r})",
    "says that it has ended and leaves": TO_EVERY_DESCRIPTOR + f"tell({FORGED_END!r})\nos._exit(0)",
    "asks the tests to do something": TO_EVERY_DESCRIPTOR
    + 'tell(b\'{"ask": "getattr", "arguments": {"tuple": ["", "x"]}, "named": {"dict": []}}\\n\')',
    "says nonsense as its own ending": TO_EVERY_DESCRIPTOR + "tell(b'{\"ended\": [[[], {}], 3, 4]}\\n')",
    "nests too deep": TO_EVERY_DESCRIPTOR + "tell(b'[' * 10**5 + b'\\n')",
    "an exit handler": "import atexit, os\natexit.register(os._exit, 0)",
    "leaves at once": "import os\nos._exit(0)",
    "leaves when it is called": "import os\ndouble = lambda x: os._exit(0)",
    "leaves politely": "import sys\nsys.exit(0)",
    "leaves politely when it is called": "import sys\ndouble = lambda x: sys.exit(0)",
    "no os.write": "import os, posix\nos.write = posix.write = lambda *_: 0",
    "no exceptions": "import builtins\nbuiltins.AssertionError = builtins.BaseException = 3" + WRONG,
    "an exception that cannot be printed": """
        import os
        class Mute(Exception):
            def __str__(self): os._exit(0)
        def double(x): raise Mute
        """,
    "an exception hook": "import sys, os\nsys.excepthook = lambda *_: os._exit(0)" + WRONG,
    "another main module": "import sys\nsys.modules['__main__'] = sys.modules['builtins']" + WRONG,
    "a harness without room for a failure": """
        import sys
        for module in list(sys.modules.values()):
            if module.__name__.startswith("feature_server."): module.MAX_DETAIL_CHARS = 0
        assert False
        """,
    "a harness that always passes": """
        import sys
        for module in list(sys.modules.values()):
            if module.__name__.endswith("program_roles"): module._status = module._ending = lambda *_: ("passed", "")
        assert False
        """,
    "a harness that is changed on the stack": """
        import sys
        frame = sys._getframe()
        while frame:
            frame.f_locals.update(ending=("passed", ""), names={"double": lambda x: 2 * x})
            frame.f_globals.update(_ending=lambda *_: ("passed", ""), _judged=lambda *_: ["passed", ""])
            frame = frame.f_back
        assert False
        """,
    "a trace function": """
        import sys
        def jump(frame, event, argument): return jump
        frame = sys._getframe()
        while frame: frame.f_trace = jump; frame = frame.f_back
        sys.settrace(jump)
        raise ValueError
        """,
    "a number that equals all": """
        class All(int):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
        double = lambda x: All(7)
        """,
    "an object that equals all": """
        class All:
            def __eq__(self, other): return True
            def __getattr__(self, name): return lambda *_: True
        double = lambda x: All()
        """,
    "a class whose objects equal all": """
        class Kind(type):
            def __eq__(self, other): return True
            def __hash__(self): return hash(int)
        class All(metaclass=Kind): pass
        double = lambda x: All
        """,
    "a text that equals all": "class All(str):\n    __eq__ = lambda *_: True\ndouble = lambda x: All()",
    "builtins of its own": "import builtins\nbuiltins.abs = builtins.bool = abs = bool = lambda *_: True" + WRONG,
    "a module of the tests": "import sys\nsys.modules['math'] = sys.modules['operator'] = None" + WRONG,
    "searches for the tests": """
        import gc, sys
        def double(x):
            frames = [f for f in sys._current_frames().values()]
            while frames[-1].f_back: frames.append(frames[-1].f_back)
            values = [v for o in gc.get_objects() for v in gc.get_referents(o)] + [dict(f.f_locals) for f in frames]
            found = [v for v in map(str, values) if "".join(["double(", "3) == 6"]) in v]
            return 2 * x if found else 7
        """,
    "comments the tests out": WRONG + '"""',
    "ends within brackets": WRONG + "print(",
    "a branch that is never taken": WRONG + "if False:\n    pass",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_no_program_passes_tests_that_it_fails(name: str) -> None:
    result = run(FORGERIES[name], TESTS)
    assert result.status in ("failed", "crashed", "forbidden", "memory"), result
    assert len(result.detail) < 1100


CARELESS_TESTS = {
    "a bare except": "try: double(3)\nexcept: pass",
    "a tolerance": "assert abs(double(3) - 6) < 1e-6",
    "an order": "assert double(3) >= 6 and not double(3) < 6",
    "a truth in between": "assert 6 <= double(3) <= 6",
    "membership": "assert double(3) in [6]",
    "membership in what it returns": "assert 6 in double(3)",
    "all of them": "assert sorted([double(3), 6]) == [6, 6]",
    "as a key": "assert {6: 1}[double(3)]",
    "in a container": "assert [double(3)] == [6] and (double(3),) == (6,)",
    "not unequal": "assert not double(3) != 6",
    "through a callback": "assert (lambda call: call(3))(double) == 6",
}
TURNCOAT = """
class All:
    def __bool__(self): return True
    def __hash__(self): return hash(6)
    def __iter__(self): return iter([self])
for name in "eq le lt ge gt sub rsub abs contains add radd".split():
    setattr(All, f"__{name}__", lambda self, *_: self)
All.__contains__ = lambda *_: True
double = lambda x: All()
"""


@pytest.mark.parametrize("name", CARELESS_TESTS)
def test_objects_of_the_program_do_not_decide_about_plain_values(name: str) -> None:
    leaves = "import os\ndouble = lambda x: os._exit(0)"
    assert run(leaves, CARELESS_TESTS[name]).status == "crashed"
    if name != "a bare except":
        assert run(TURNCOAT, CARELESS_TESTS[name]).status == "failed"
        assert run("double = lambda x: [6] if x == 'list' else 6", "assert double('list') == [6]").status == "passed"


def test_a_program_learns_nothing_of_an_earlier_job() -> None:
    secret = secrets.token_hex(16)
    assert run(f"mine = '{secret}'", f"assert mine == '{secret}'").status == "passed"
    search = f"""
        import gc, sys
        half, rest = {secret[:16]!r}, {secret[16:]!r}
        frame = sys._getframe()
        texts = [str(v) for o in gc.get_objects() for v in gc.get_referents(o) if isinstance(v, (str, bytes))]
        while frame: texts.append(str(frame.f_locals)); frame = frame.f_back
        assert len(texts) > 1000 and not [text for text in texts if "".join([half, rest]) in text]
        """
    assert run(search) == Result(status="passed", detail="")


@NEEDS_HIDDEN_FILES
@pytest.mark.parametrize("what", ["environ", "mem", "maps", "fd", "cmdline"])
def test_proc_shows_nothing_of_other_processes(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {os.getpid(), os.getppid(), 1}
    program = f"""
        import os
        for process in [*{others}, os.getppid(), "self", "thread-self"]:
            path = f"/proc/{{process}}/{what}"
            try: os.listdir(path) if {what == "fd"} else open(path, "rb")
            except PermissionError: continue
            raise AssertionError(path)
        """
    assert run(program) == Result(status="passed", detail="")


@NEEDS_HIDDEN_FILES
def test_files_of_the_user_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    for attempt in (f"open({str(tmp_path / 'secret')!r})", f"import os\nos.listdir({str(tmp_path)!r})"):
        assert run(attempt).status == "forbidden"
    here = Path(__file__).resolve()
    assert run(f"open({str(here)!r})").status == "forbidden", "nor this project"
    assert run("import feature_server.config").status in ("failed", "forbidden")
    assert run("open('/etc/passwd')").status == "forbidden"
    assert run("import json\nopen(json.__file__).read()").status == "passed", "only Python's own"


def test_secrets_of_the_environment_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the program's environment, nor in those of the processes around it, nor in the C library's."""
    monkeypatch.setenv("HF_TOKEN", secret := secrets.token_hex(16))
    look = f"""
        import ctypes, os
        seen = str(os.environ) + str(ctypes.CDLL(None).getenv(b"HF_TOKEN"))
        for process in ("self", os.getppid()):
            try: seen += open(f"/proc/{{process}}/environ").read()
            except OSError: pass
        assert {secret!r} not in seen and "HF_TOKEN" not in seen
        """
    own = program_sandbox()
    assert own.run(textwrap.dedent(look), "", timeout_s=20.0, memory_mib=256).status == "passed"


FLOODS = {
    "prints": "import os\nfor _ in range(2000): os.write(1, b'x' * 10**6); os.write(2, b'x' * 10**6)",
    "prints by the C library": "import ctypes\nfor _ in range(10**5): ctypes.CDLL(None).puts(b'x' * 1000)",
    "returns too much": "def double(x): return 'x' * 10**8 * 5",
    "sends too much": TO_EVERY_DESCRIPTOR + "for _ in range(2000): tell(b'x' * 10**6)",
}


@pytest.mark.parametrize("name", FLOODS)
def test_floods_go_nowhere(name: str, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_size for path in Path(tmp_path).iterdir()}
    assert run(FLOODS[name], TESTS).status in ("failed", "memory", "crashed", "timeout")
    assert before == {path.name: path.stat().st_size for path in Path(tmp_path).iterdir()}


def test_a_verdict_that_is_none_ends_one_job_alone() -> None:
    """Also where the tests, which are the data's, write it."""
    for written in (b"", b"unconfined", b"[]", b"[1, 2]", b'["refused", ""]', b'"passed"', b"\xff\xfe", b"x" * 10**4):
        tests = f"import os\nfor descriptor in range(3, 65):\n    try: os.write(descriptor, {written!r})\n"
        result = run("", tests + "    except OSError: pass\nos._exit(0)")
        assert result.status == "crashed", (written, result)


def test_what_the_processes_hold_open() -> None:
    """The program has its two pipes and nothing else; the standard descriptors lead nowhere."""
    look = """
        import os
        def held():
            numbers = []
            for descriptor in range(3, 200):
                try: os.fstat(descriptor)
                except OSError: continue
                numbers.append(descriptor)
            return len(numbers)
        null = os.stat("/dev/null").st_rdev
        assert all(os.fstat(standard).st_rdev == null for standard in range(3))
        """
    assert run(look, "assert held() == 2") == Result(status="passed", detail="")
