"""A seccomp filter that leaves a process nothing but computing, threads and the reading of files.

Guarantee: after `confine()` the process and all of its threads, later ones included, can make only the calls
below. There is no call among them that opens a connection, starts a process or a program, signals or traces
another process, or creates, changes or removes a file; what the process has open already, it may still write to.
The list names what is allowed, so a call that a later kernel adds (another io_uring) is refused from the start.
It needs no privilege and cannot be undone. It does not hide files: what the user may read, the process may read.

Called in child processes only, before they run what a model wrote. Standard library only: it starts fast.
"""

import ctypes
import errno
import os
import struct

ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "access": (21, None),
    "alarm": (37, None),
    "brk": (12, 214),
    "clock_getres": (229, 114),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "clone": (56, 220),
    "close": (3, 57),
    "close_range": (436, 436),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "fcntl": (72, 25),
    "fstat": (5, 80),
    "futex": (202, 98),
    "getcwd": (79, 17),
    "getdents64": (217, 61),
    "getegid": (108, 177),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getitimer": (36, 102),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getrandom": (318, 278),
    "getrusage": (98, 165),
    "gettid": (186, 178),
    "gettimeofday": (96, 169),
    "getuid": (102, 174),
    "lseek": (8, 62),
    "lstat": (6, None),
    "madvise": (28, 233),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "munmap": (11, 215),
    "nanosleep": (35, 101),
    "newfstatat": (262, 79),
    "openat": (257, 56),
    "pause": (34, None),
    "pipe2": (293, 59),
    "poll": (7, None),
    "ppoll": (271, 73),
    "pread64": (17, 67),
    "pselect6": (270, 72),
    "read": (0, 63),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "readv": (19, 65),
    "restart_syscall": (219, 128),
    "rseq": (334, 293),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_getaffinity": (204, 123),
    "sched_yield": (24, 124),
    "select": (23, None),
    "set_robust_list": (273, 99),
    "set_tid_address": (218, 96),
    "setitimer": (38, 103),
    "sigaltstack": (131, 132),
    "stat": (4, None),
    "statx": (332, 291),
    "sysinfo": (99, 179),
    "time": (201, None),
    "times": (100, 153),
    "uname": (63, 160),
    "write": (1, 64),
    "writev": (20, 66),
}
"""Calls that are let through, with their numbers on x86_64 and on aarch64 (None: that architecture has none)."""

CLONE_THREAD, CLONE_NEW_NAMESPACES = 0x0001_0000, 0x7E02_0000
O_TMPFILE_BIT = os.O_TMPFILE & ~os.O_DIRECTORY
CHANGES_FILES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | O_TMPFILE_BIT
F_GETFD = 1

CONDITIONS: dict[str, tuple[int, int, int]] = {
    "clone": (0, CLONE_THREAD | CLONE_NEW_NAMESPACES, CLONE_THREAD),  # threads, not processes
    "openat": (2, CHANGES_FILES, 0),  # reading only
    "fcntl": (1, 0xFFFF_FFFF, F_GETFD),  # F_SETOWN and F_SETSIG would send signals
    "madvise": (2, 0xFFFF_FFE0, 0),  # advice from 100 on poisons memory pages of the machine
}
"""Calls that are let through only if (argument & mask) == value; (argument's index, mask, value), low 32 bits."""

CLONE3 = 435
"""Its flags lie in memory, which no filter can read. "No such call" makes the C library take clone instead."""

ARCHITECTURES = {"x86_64": (0, 0xC000_003E, 317), "aarch64": (1, 0xC000_00B7, 277)}
"""Machine -> column of ALLOWED, the kernel's identifier of the calling convention, number of seccomp()."""

LOAD, AND, JUMP_IF_EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
"""Instructions of the filter: load the word at an offset, mask it, compare it, end with a verdict."""
ALLOW, REFUSE, KILL = 0x7FFF_0000, 0x0005_0000, 0x8000_0000
"""Verdicts: let through, return an error number, end the process."""
CALL_NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16
"""Offsets [bytes] in the record that the kernel shows the filter; an argument has 8 bytes, the low half first."""

PR_SET_NO_NEW_PRIVS, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC = 38, 1, 1

Instruction = tuple[int, int, int, int]
"""Code, instructions to skip if equal, instructions to skip if not, operand."""


class _FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def confine() -> None:
    """Refuse this process and its threads every call that is not in ALLOWED, from now on, irrevocably.

    A refused call fails with EPERM, in Python a PermissionError. Other calling conventions of the machine (32 bit)
    end the process.
    Raises: RuntimeError where the machine or its kernel has no such filter: nothing runs with less protection.
    Test: test_sandbox.py
    """
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise RuntimeError(
            f"generated code cannot be confined here: there is no table of system calls for {machine!r}, only for "
            f"{' and '.join(ARCHITECTURES)}; run the verifier on such a machine, or choose one that runs no code"
        )
    instructions = assemble(machine)
    program = _FilterProgram(len(instructions), b"".join(struct.pack("<HBBI", *step) for step in instructions))
    libc = ctypes.CDLL(None, use_errno=True)
    _require(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    # Not prctl(): only this call reaches threads that exist already.
    number = ARCHITECTURES[machine][2]
    _require(libc.syscall(number, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, ctypes.byref(program)))


def assemble(machine: str) -> list[Instruction]:
    """The filter's program: each call is compared in turn, and what matches none is refused."""
    column, architecture, _ = ARCHITECTURES[machine]
    program = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (JUMP_IF_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, CALL_NUMBER_AT),
        *_if_equal(CLONE3, [(RETURN, 0, 0, REFUSE | errno.ENOSYS)]),
    ]
    for name, numbers in ALLOWED.items():
        number = numbers[column]
        if number is not None:
            program += _if_equal(number, _verdict(name))
    return [*program, (RETURN, 0, 0, REFUSE | errno.EPERM)]


def _verdict(name: str) -> list[Instruction]:
    if name not in CONDITIONS:
        return [(RETURN, 0, 0, ALLOW)]
    argument, mask, value = CONDITIONS[name]
    return [
        (LOAD, 0, 0, ARGUMENTS_AT + 8 * argument),
        (AND, 0, 0, mask),
        *_if_equal(value, [(RETURN, 0, 0, ALLOW)]),
        (RETURN, 0, 0, REFUSE | errno.EPERM),
    ]


def _if_equal(value: int, then: list[Instruction]) -> list[Instruction]:
    return [(JUMP_IF_EQUAL, 0, len(then), value), *then]


def _require(status: int) -> None:
    if status != 0:  # -1 with errno, or the id of a thread that could not be confined
        reason = os.strerror(ctypes.get_errno()) if status < 0 else f"its thread {status} has another filter"
        raise RuntimeError(
            f"generated code cannot be confined here: the kernel refused a seccomp filter ({reason}); allow seccomp "
            "in the container's settings or run on Linux 3.17 or newer, or choose a verifier that runs no code"
        )
