"""Landlock: files outside a few folders cannot be opened, whatever the user may read. Linux 5.13 and newer.

It needs no privilege and cannot be undone. Beside the system-call filter it takes from a process what that filter
cannot judge, the paths: the user's files, and what /proc shows of other processes.

Called in child processes only, before they run what a model wrote. Standard library only: it starts fast.
"""

import ctypes
import os
import struct
from collections.abc import Iterable

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""Numbers of the three calls, the same on every architecture."""
RULE_PATH_BENEATH = 1
READ_FILE, READ_FOLDER = 1 << 2, 1 << 3
EVERY_RIGHT = (1 << 13) - 1
"""What the first version of Landlock can take away: reading, writing, executing, creating and removing."""
PR_SET_NO_NEW_PRIVS = 38


def rules_exist() -> bool:
    """Whether the kernel has Landlock switched on."""
    version_query = 1
    return _libc().syscall(CREATE_RULESET, None, 0, version_query) > 0


def hide_files(visible: Iterable[str]) -> None:
    """From now on this process and its threads can open nothing but these files and what is in these folders, to read.

    Paths that do not exist are left out. Call it before the system-call filter, which refuses the calls it makes.
    Raises: OSError if the kernel refuses; see `rules_exist`.
    Test: test_sandbox_attacks.py
    """
    libc = _libc()
    handled = struct.pack("=Q", EVERY_RIGHT)
    rules = _require(libc.syscall(CREATE_RULESET, handled, len(handled), 0))
    try:
        for path in visible:
            if os.path.exists(path):
                _allow_reading(libc, rules, path)
        _require(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        _require(libc.syscall(RESTRICT_SELF, rules, 0))
    finally:
        os.close(rules)


def _allow_reading(libc: ctypes.CDLL, rules: int, path: str) -> None:
    rights = READ_FILE | READ_FOLDER if os.path.isdir(path) else READ_FILE
    place = os.open(path, os.O_PATH)
    try:
        rule = struct.pack("=Qi", rights, place)
        _require(libc.syscall(ADD_RULE, rules, RULE_PATH_BENEATH, rule, 0))
    finally:
        os.close(place)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _require(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"Landlock refused: {os.strerror(number)}")
    return result
