"""Malicious programs: what they try has no effect, none of them passes, and nothing of them is left."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from feature_server.verifiers import syscall_filter
from feature_server.verifiers.sandbox import Result, Sandbox, program_sandbox
from feature_server.verifiers.syscall_filter import ALLOWED, ARCHITECTURES, CLONE3, CONDITIONS, assemble, confine

ROOT = Path(__file__).resolve().parents[2]
MACHINE = os.uname().machine
X32_BIT = 0x4000_0000


@functools.cache
def sandbox() -> Sandbox:
    """That of all tests: one warm process, as they run one after the other."""
    return program_sandbox()


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After every test: no process that was not there before, and an empty folder for temporary files."""
    sandbox()
    folder = tmp_path_factory.mktemp("temporary")
    before = set(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        yield
    assert set(psutil.Process().children(recursive=True)) <= before
    assert list(folder.iterdir()) == []


def run(program: str, tests: str = "", *, timeout_s: float = 60.0, memory_mib: int = 256) -> Result:
    texts = (textwrap.dedent(program), textwrap.dedent(tests))
    return sandbox().run(*texts, timeout_s=timeout_s, memory_mib=memory_mib)


def run_unconfined(program: str) -> int:
    """Exit code of the same program as an ordinary process: what the sandbox is compared with."""
    command = [sys.executable, "-S", "-c", textwrap.dedent(program)]
    return subprocess.run(command, capture_output=True, timeout=120, check=False).returncode


HARMLESS = {
    "empty": "",
    "assertions that hold": "def double(x):\n    return 2 * x\nassert double(3) == 6",
    "standard library": """
        import collections, dataclasses, datetime, decimal, fractions, functools, hashlib, heapq, itertools, json, math
        import random, re, sqlite3, statistics, string, struct, typing, unittest, uuid, zlib
        assert json.loads(json.dumps({"a": [1, 2.5, None]}))["a"][1] == 2.5
        assert sqlite3.connect(":memory:").execute("select 1 + 1").fetchone() == (2,)
        assert random.random() < 1 and uuid.uuid4() != uuid.uuid4() and datetime.datetime.now().astimezone()
        """,
    "threads": """
        import threading
        from concurrent.futures import ThreadPoolExecutor
        found = []
        threads = [threading.Thread(target=found.append, args=(i,)) for i in range(20)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert sorted(found) == list(range(20))
        with ThreadPoolExecutor(4) as pool: assert list(pool.map(abs, range(-9, 0))) == list(range(9, 0, -1))
        """,
    "a timer of its own": """
        import signal, time
        def late(*_): raise TimeoutError
        signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try: time.sleep(1000)
        except TimeoutError: pass
        else: raise AssertionError
        """,
    "SystemExit in a thread ends the thread": """
        import threading, sys
        thread = threading.Thread(target=sys.exit)
        thread.start(); thread.join()
        """,
    "many prints": "import sys\nfor file in (sys.stdout, sys.stderr): print('x' * 3_000_000, file=file)",
    "its own exceptions": "try: 1 / 0\nexcept BaseException: pass",
    "too much memory, caught": "try: bytearray(10**12)\nexcept MemoryError: pass",
    "classes that are pickled": "import pickle\nclass A: pass\nassert type(pickle.loads(pickle.dumps(A()))) is A",
    "no input": "import sys, os\nassert sys.stdin.read() == '' and sys.argv == ['-c'] and os.read(0, 9) == b''",
    "an empty folder": "import os\nassert os.listdir() == [] and os.getcwd().startswith('/')",
    "its name": "assert __name__ == '__main__'\nimport __main__\nassert __main__.__dict__ is globals()",
    "letters": "assert len('größer 漢字 🙂') == 11",
    "a long program": "x = 1\n" * 20_000 + "assert x == 1",
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_programs_pass(name: str) -> None:
    assert run(HARMLESS[name]) == Result(status="passed", detail="")


ENDINGS = {
    "assertion": ("assert 1 == 2, 'no'", "failed", "AssertionError: no"),
    "exception": ("{}['key']", "failed", "KeyError: 'key'"),
    "interrupt": ("raise KeyboardInterrupt", "failed", "KeyboardInterrupt: "),
    "syntax": ("def f(:", "failed", "SyntaxError"),
    "null byte": ("'\0'", "failed", "null bytes"),
    "half a character": ("'\ud800'", "failed", "UnicodeEncodeError"),
    "deep recursion": ("def f(): f()\nf()", "failed", "RecursionError"),
    "long message": ("raise ValueError('x' * 10**6)", "failed", "ValueError: xxx"),
    "one large object": ("x = bytearray(10**10)", "memory", "MemoryError"),
    "many objects": ("x = []\nwhile True: x.append([0] * 10**6)", "memory", "MemoryError"),
    "threads that take memory": (
        "import threading\nwhile True: threading.Thread(target=threading.Event().wait, daemon=True).start()",
        "failed",
        "can't start new thread",
    ),
    "os._exit": ("import os\nos._exit(0)", "crashed", "exit code 0"),
    "sys.exit": ("import sys\nsys.exit(0)", "crashed", "SystemExit: 0"),
    "os._exit in a thread": (
        "import os, threading, time\nthreading.Thread(target=os._exit, args=(0,)).start()\ntime.sleep(1000)",
        "crashed",
        "exit code 0",
    ),
    "bad pointer": ("import ctypes\nctypes.string_at(0)", "crashed", "SIGSEGV"),
    "all descriptors closed": ("import os\nos.closerange(0, 100)", "crashed", "exit code"),
    "closed, then a failure": ("import os\nos.closerange(0, 100)\nassert False", "crashed", "exit code"),
    "network": ("import socket\nsocket.socket()", "forbidden", "PermissionError"),
    "file": ("open('x', 'w')", "forbidden", "PermissionError"),
    "process": ("import os\nos.fork()", "forbidden", "PermissionError"),
    "limits": ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))", "failed", "not allowed"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_every_other_ending_is_named(name: str) -> None:
    program, status, detail = ENDINGS[name]
    result = run(program)
    assert (result.status, detail in result.detail) == (status, True), result
    assert len(result.detail) < 1100


HANGS = {
    "busy": "while True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "lock": "import threading\nthreading.Lock().acquire() or threading.Event().wait()\nthreading.Event().wait()",
    "deaf to signals": """
        import signal, time
        for number in range(1, 32):
            try: signal.signal(number, signal.SIG_IGN)
            except OSError: pass
        while True: time.sleep(1000)
        """,
    "in one bytecode": "9 ** 9 ** 9",
    "closed its verdict": "import os, time\nos.closerange(0, 100)\ntime.sleep(1000)",
    "forks forever": """
        import os
        while True:
            try: os.fork()
            except OSError: pass
        """,
    "catches everything": """
        while True:
            try:
                while True: pass
            except BaseException: pass
        """,
}


@pytest.mark.parametrize("name", HANGS)
def test_programs_that_hang_are_ended_at_their_deadline(name: str) -> None:
    """None of them ends by itself, so returning at all shows that it was ended."""
    result = run(HANGS[name], timeout_s=0.3)
    assert (result.status, result.detail) == ("timeout", "not finished after 0.3 s")


def test_threads_do_not_outlive_the_deadline() -> None:
    """Those that compute outside the interpreter's lock cannot be interrupted by it; these would run forever."""
    program = """
        import hashlib, threading
        data = bytes(10**8)
        def compute():
            while True: hashlib.sha512(data)
        threads = [threading.Thread(target=compute) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        """
    assert run(program, timeout_s=0.5, memory_mib=2048).status == "timeout"


EFFECTS = {
    "write": "open(folder + '/kept', 'w').write('x')",
    "append": "open(folder + '/kept', 'a').write('x')",
    "write in place": "open(folder + '/kept', 'r+').write('x')",
    "truncate on reading": "os.open(folder + '/kept', os.O_RDONLY | os.O_TRUNC)",
    "truncate": "os.truncate(folder + '/kept', 0)",
    "create an empty file": "open(folder + '/new', 'x')",
    "create by the C library": "ctypes.CDLL(None).creat((folder + '/new').encode(), 0o600)",
    "create by mknod": "os.mknod(folder + '/new')",
    "make a folder": "os.mkdir(folder + '/new')",
    "make a link": "os.link(folder + '/kept', folder + '/new')",
    "make a symbolic link": "os.symlink('kept', folder + '/new')",
    "make a socket": "socket.socket(socket.AF_UNIX).bind(folder + '/new')",
    "rename": "os.rename(folder + '/kept', folder + '/new')",
    "delete": "os.remove(folder + '/kept')",
    "delete the folder": "shutil.rmtree(folder)",
    "change the mode": "os.chmod(folder + '/kept', 0o600)",
    "change the time": "os.utime(folder + '/kept', (1, 1))",
    "shell": "os.system(f'touch {folder}/new')",
    "process": "subprocess.run(['/bin/touch', folder + '/new'])",
    "spawn": "os.waitpid(os.posix_spawn('/bin/touch', ['touch', folder + '/new'], {}), 0)",
    "replace itself": "os.execv('/bin/touch', ['touch', folder + '/new'])",
    "fork": "pid = os.fork()\nif pid: os.waitpid(pid, 0)\nelse: open(folder + '/new', 'x'); os._exit(0)",
    "process pool": "multiprocessing.get_context('fork').Pool(1).map(os.mkdir, [folder + '/new'])",
}


def contents(folder: Path) -> list[tuple]:
    paths = sorted([folder, *folder.rglob("*")]) if folder.exists() else []
    status = [os.lstat(path) for path in paths]
    return [(path, s.st_mode, s.st_size, s.st_mtime, s.st_nlink) for path, s in zip(paths, status, strict=True)]


@pytest.mark.parametrize("name", EFFECTS)
def test_no_file_is_changed(name: str, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "kept").chmod(0o640)
    before = contents(tmp_path)
    modules = ("ctypes", "multiprocessing", "os", "shutil", "socket", "subprocess")
    imports = "".join(f"import {module}\n" for module in modules if f"{module}." in EFFECTS[name])
    program = f"{imports}folder = {str(tmp_path)!r}\n{EFFECTS[name]}"
    result = run(program)
    assert contents(tmp_path) == before
    assert (tmp_path / "kept").read_text() == "kept"
    assert result.status in ("forbidden", "passed", "failed"), result
    assert run_unconfined(program) in (0, 1)
    assert contents(tmp_path) != before, "unconfined, the same program has its effect"


def test_no_connection_is_made() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        program = f"import socket\nsocket.create_connection({server.getsockname()!r}, timeout=5).send(b'x')"
        assert run(program).status == "forbidden"
        with pytest.raises(TimeoutError):
            server.accept()
        assert run_unconfined(program) == 0
        server.accept()[0].close()


def test_no_signal_reaches_another_process() -> None:
    attempt = "import os\nos.kill({pid}, 9)"
    with subprocess.Popen(["/bin/sleep", "60"]) as victim:
        try:
            assert run(attempt.format(pid=victim.pid)).status == "forbidden"
            assert run(attempt.format(pid="os.getppid()")).status == "forbidden"
            assert run(attempt.format(pid=-1)).status == "forbidden"
            assert victim.poll() is None
            assert run_unconfined(attempt.format(pid=victim.pid)) == 0
            assert victim.wait(timeout=120) == -signal.SIGKILL
        finally:
            victim.kill()


def test_nothing_of_our_environment_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    assert run("import os\nassert 'SECRET_TOKEN' not in os.environ and 'PATH' not in os.environ").status == "passed"
    with tempfile.TemporaryFile() as ours:
        os.set_inheritable(ours.fileno(), True)
        assert run(f"import os\nos.fstat({ours.fileno()})").detail.startswith("OSError: [Errno 9]")


def test_the_same_program_gets_the_same_hashes() -> None:
    command = [sys.executable, "-c", "print(hash('word'))"]
    value = subprocess.run(command, env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True, check=True).stdout
    assert run(f"assert hash('word') == {value}").status == "passed"


def test_programs_run_concurrently(tmp_path: Path) -> None:
    """Each of them ends only after all of them were there at once."""
    waits = f"import os, time\nwhile not os.path.exists({str(tmp_path / 'all are there')!r}): time.sleep(0.01)"
    own, here = program_sandbox(), psutil.Process()
    before = set(here.children())
    with ThreadPoolExecutor(6) as pool:
        jobs = [(waits, ""), (waits, "assert False")] * 3
        results = pool.map(lambda job: own.run(*job, timeout_s=60.0, memory_mib=256), jobs)
        wait_for(lambda: len(set(here.children()) - before) == len(jobs) - 1)
        (tmp_path / "all are there").touch()
        assert [result.status for result in results] == ["passed", "failed"] * 3


def test_a_killed_run_leaves_nothing_behind() -> None:
    """Neither processes nor folders, whether it is killed during a job or between two."""
    imported = "import time\nfrom feature_server.verifiers.sandbox import program_sandbox\ns = program_sandbox()"
    for job in ("s.run('while 1: 0', '', timeout_s=60., memory_mib=99)", "time.sleep(60)"):
        environment = {**os.environ, "TMPDIR": tempfile.gettempdir()}
        program = f"{imported}\nprint('ready', flush=True)\n{job}"
        command = [sys.executable, "-c", program]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
            (warm,) = psutil.Process(parent.pid).children()
            wait_for(lambda warm=warm, job=job: len(warm.children()) == (2 if "while" in job else 0))
            below = [warm, *warm.children()]
            parent.kill()
        wait_for(lambda below=below: all(map(has_ended, below)))
        wait_for(lambda: not list(Path(tempfile.gettempdir()).iterdir()))


def test_a_warm_process_that_is_killed_costs_one_job() -> None:
    own, here = program_sandbox(), psutil.Process()
    before = set(here.children())
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(own.run, "while 1: 0", "", timeout_s=60.0, memory_mib=99)
        warm = max(before, key=lambda process: process.create_time())
        wait_for(lambda: len(warm.children()) == 2)
        below = warm.children()
        warm.kill()
        assert job.result().status == "crashed"
    wait_for(lambda: all(map(has_ended, below)))
    assert own.run("", "", timeout_s=60.0, memory_mib=99).status == "passed", "another took its place"
    folder = Path(tempfile.gettempdir())
    del own
    assert list(folder.iterdir()) == []


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_call_outside_the_table_is_refused() -> None:
    """Each number that the kernel may know, and those of the x32 convention: refused, with an error and no more."""
    column = ARCHITECTURES[MACHINE][0]
    allowed = [numbers[column] for numbers in ALLOWED.values()]
    allowed += [335, 336] if MACHINE == "x86_64" else []  # uretprobe and uprobe end who calls them, filter or not
    program = f"""
        import ctypes, errno
        call = ctypes.CDLL(None, use_errno=True).syscall
        for number in range(700):
            if number in {allowed}: continue
            assert call(number, 0, 0, 0, 0, 0, 0) == -1, number
            assert ctypes.get_errno() == (errno.ENOSYS if number == {CLONE3} else errno.EPERM), number
        for number in range(700):
            assert call({X32_BIT} | number, 0, 0, 0, 0, 0, 0) == -1, number
            assert ctypes.get_errno() == errno.EPERM, number
        """
    assert run(program) == Result(status="passed", detail="")


def test_calls_that_depend_on_an_argument() -> None:
    program = """
        import ctypes, errno, fcntl, mmap, os, signal
        libc = ctypes.CDLL(None, use_errno=True)
        def refused(call, *arguments):
            ctypes.set_errno(0)
            return call(*arguments) == -1 and ctypes.get_errno() == errno.EPERM
        for flag in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_TMPFILE & ~os.O_DIRECTORY):
            assert refused(libc.open, b"/dev/null", flag), flag
            assert refused(libc.open, b"/dev/null", flag | os.O_APPEND | os.O_CLOEXEC), flag
        assert libc.open(b"/dev/null", os.O_RDONLY | os.O_CLOEXEC) > 2
        for command in (fcntl.F_SETOWN, fcntl.F_SETFL, 10, fcntl.F_SETLEASE, fcntl.F_NOTIFY):
            assert refused(libc.fcntl, 0, command, 0), command
        page = mmap.mmap(-1, 4096)
        address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(page)))
        assert libc.madvise(address, 4096, 0) == 0
        for advice in (100, 101): assert refused(libc.madvise, address, 4096, advice), advice
        new_namespaces = [0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000]
        for flags in (signal.SIGCHLD, 0x4000 | 0x100, *(0x10000 | bit for bit in new_namespaces)):
            assert refused(libc.syscall, CLONE, flags, 0, 0, 0, 0), flags
        """
    number = ALLOWED["clone"][ARCHITECTURES[MACHINE][0]]
    assert run(program.replace("CLONE", str(number))) == Result(status="passed", detail="")


@pytest.mark.skipif(MACHINE != "x86_64", reason="32-bit calls by interrupt 0x80 are those of x86")
def test_calls_of_the_32_bit_convention_end_the_program() -> None:
    program = """
        import ctypes, mmap
        getpid = bytes.fromhex("b814000000 cd80 c3")  # mov eax, 20; int 0x80; ret
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write(getpid)
        ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
        """
    result = run(program)
    assert result.status == "crashed" and result.detail in ("ended by SIGSYS", "ended by SIGSEGV")


def simulated(program: list[tuple[int, int, int, int]], record: dict[int, int]) -> int:
    """What the kernel's filter machine does with the program: an independent, slow one for the four instructions."""
    at, value = 0, 0
    while True:
        code, skip_if_equal, skip_if_not, operand = program[at]
        at += 1
        match code:
            case 0x20:
                value = record[operand]
            case 0x54:
                value &= operand
            case 0x15:
                at += skip_if_equal if value == operand else skip_if_not
            case 0x06:
                return operand


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_filter_of_each_machine_decides_by_the_table(machine: str) -> None:
    """Also for the machine that these tests do not run on."""
    column, architecture, _ = ARCHITECTURES[machine]
    program = assemble(machine)
    names = {numbers[column]: name for name, numbers in ALLOWED.items() if numbers[column] is not None}
    assert len(names) == sum(numbers[column] is not None for numbers in ALLOWED.values()), "numbers are distinct"
    allow, not_permitted, no_such_call, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    for number in [*range(700), *(X32_BIT | number for number in range(700))]:
        for argument in (0, 1, 3, 25, 0x3D0F00, 0x41, 100, 0xFFFFFFFF):
            record = {0: number, 4: architecture, **{16 + 8 * index: argument for index in range(6)}}
            name = names.get(number)
            expected = no_such_call if number == 435 else not_permitted
            if name is not None:
                _, mask, value = CONDITIONS.get(name, (0, 0, 0))
                expected = allow if argument & mask == value else not_permitted
            assert simulated(program, record) == expected, (number, name, argument)
            assert simulated(program, {**record, 4: architecture ^ 1}) == kill


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "/usr/include/asm-generic/unistd.h")],
)
def test_numbers_are_those_of_the_kernel(machine: str, header: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"the kernel's headers are not installed here: no {header}")
    defined = {}
    for line in Path(header).read_text().splitlines():
        with contextlib.suppress(ValueError):
            _, name, number = line.split()[:3]
            defined[name.removeprefix("__NR3264_").removeprefix("__NR_")] = int(number)
    if machine == "aarch64":
        defined["newfstatat"] = defined["fstatat"]  # its name where all numbers have 64 bits
    column, _, seccomp = ARCHITECTURES[machine]
    assert {name: defined.get(name) for name in ALLOWED} == {name: both[column] for name, both in ALLOWED.items()}
    assert (defined["seccomp"], defined["clone3"]) == (seccomp, CLONE3)


def test_without_a_filter_nothing_runs(tmp_path: Path) -> None:
    """A kernel that refuses: here one that was told so, by a filter around the whole run."""
    number = ARCHITECTURES[MACHINE][2]
    program = f"""
        import ctypes, struct
        from feature_server.verifiers import syscall_filter as f
        steps = [(f.LOAD, 0, 0, 0), (f.JUMP_IF_EQUAL, 0, 1, {number}), (f.RETURN, 0, 0, f.REFUSE | 1),
                 (f.RETURN, 0, 0, f.ALLOW)]
        libc = ctypes.CDLL(None)
        libc.prctl(38, 1, 0, 0, 0)
        code = f._FilterProgram(len(steps), b"".join(struct.pack("<HBBI", *step) for step in steps))
        assert libc.prctl(22, 2, ctypes.byref(code)) == 0
        from feature_server.verifiers.sandbox import program_sandbox
        program_sandbox().run("open({str(tmp_path / "new")!r}, 'w')", "", timeout_s=9, memory_mib=99)
        """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert "RuntimeError: generated code cannot be confined here: the kernel refused" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(syscall_filter.ARCHITECTURES, MACHINE)
    with pytest.raises(RuntimeError, match=f"no table of system calls for '{MACHINE}'"):
        confine()
