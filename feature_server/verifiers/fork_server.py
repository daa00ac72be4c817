"""The warm process that forks confined children, one for each text of a job, and tells how they ended.

Guarantee: a job's children are gone before its outcome is told, within its time. This process runs nothing that a model
wrote and never reads it: each text comes as a descriptor, which the child that it is for opens. So nothing of one job
is there for the next, and one child knows nothing of another's text.

Started by sandbox.py alone. Standard library only, and whatever the roles import.
"""

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from feature_server.verifiers.confinement import Limits, confine_process, readable_files

Role = Callable[[str, int, int], bytes | None]
"""What a child does with its text; the two descriptors lead to the child before it. The last child's bytes are the
verdict, those of the others are ignored."""
ROOT = str(Path(__file__).resolve().parents[2])
STANDARD_OUTPUT, STANDARD_ERROR = 1, 2
NO_TIME_LEFT, STARTER_GONE = "timeout", "gone"
MAX_MESSAGE_BYTES = 2**16


def serve() -> None:
    """Answer jobs until the other end closes.

    Arguments on the command line: `module:name` of a tuple of roles, the descriptor of a socket, an empty folder to run
    in. A message there is [limits, ...] with a descriptor for each role; the answer, [outcome, verdict, exit codes].
    The first message sent says that all is ready, or why nothing can be confined.
    """
    where, folder = sys.argv[1], sys.argv[3]
    control = socket.socket(fileno=int(sys.argv[2]))
    os.chdir(folder)
    module, _, name = where.partition(":")
    roles = getattr(import_module(module), name)
    sys.path.remove(ROOT)  # what runs here cannot import this project
    del sys.argv[1:]
    visible = readable_files(folder)
    os.dup2(STANDARD_OUTPUT, STANDARD_ERROR)  # from now on nothing that is printed goes anywhere
    _send(control, _first_words(visible))
    while True:
        message, texts, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, len(roles))
        if not message:
            break
        limits = Limits(*json.loads(message))
        outcome = _run(roles, texts, limits=limits, visible=visible, control=control)
        if outcome is None:
            break
        _send(control, outcome)
    os.rmdir(folder)


def _first_words(visible: Sequence[str]) -> object:
    """Empty if a child can be confined here, or else why not."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            confine_process(Limits(60.0, 1024), parent=os.getppid(), keep=[writing], visible=visible)
        except (RuntimeError, OSError) as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        reason = pipe.read().decode()
    os.waitpid(child, 0)
    return reason


def _run(
    roles: Sequence[Role], texts: Sequence[int], *, limits: Limits, visible: Sequence[str], control: socket.socket
) -> object | None:
    """Outcome, verdict and exit codes; None if the starter is gone."""
    deadline = time.monotonic() + limits.timeout_s
    verdicts, verdict = os.pipe()
    forward, backward = os.pipe(), os.pipe()
    ends = [(backward[0], forward[1]), (forward[0], backward[1])]
    parent = os.getpid()
    children: list[int] = []
    for index, (role, text) in enumerate(zip(roles, texts, strict=True)):
        judge = [verdict] if index == len(roles) - 1 else []
        if (child := os.fork()) == 0:
            _be(role, text, ends[index], judge, limits=limits, parent=parent, visible=visible)
        children.append(child)
    for descriptor in (*texts, verdict, *forward, *backward):
        os.close(descriptor)
    try:
        outcome, said = _verdict(verdicts, control, deadline)
        codes = _exit_codes(children, deadline) if not outcome and not said else []
    finally:
        os.close(verdicts)
        _end(children)
    if outcome == STARTER_GONE:
        return None
    return [NO_TIME_LEFT if codes is None else outcome, said, codes]


def _be(
    role: Role,
    text: int,
    ends: tuple[int, int],
    judge: list[int],
    *,
    limits: Limits,
    parent: int,
    visible: Sequence[str],
) -> None:
    """A child's life; it never returns."""
    try:
        with open(text, "rb") as file:
            source = file.read().decode("utf-8", "surrogatepass")
        confine_process(limits, parent=parent, keep=[*ends, *judge], visible=visible)
        said = role(source, *ends)
        if judge and said is not None:
            os.write(judge[0], said)
    finally:
        os._exit(0)


def _verdict(verdicts: int, control: socket.socket, deadline: float) -> tuple[str, str]:
    """Outcome (empty: nothing unusual) and what the judge wrote, if anything."""
    poll = select.poll()
    poll.register(verdicts, select.POLLIN)
    poll.register(control, select.POLLIN)
    ready = dict(poll.poll(1000 * max(0.0, deadline - time.monotonic())))
    if control.fileno() in ready:  # nothing is sent during a job: the starter closed its end
        return STARTER_GONE, ""
    return ("", os.read(verdicts, MAX_MESSAGE_BYTES).decode()) if ready else (NO_TIME_LEFT, "")


def _exit_codes(children: list[int], deadline: float) -> list[int] | None:
    """How each ended, negative for a signal, as long as there is time; None if there is not. Reaps them."""
    codes = []
    while children:
        pid, status = os.waitpid(children[0], os.WNOHANG)
        if pid:
            codes.append(os.waitstatus_to_exitcode(status))
            children.pop(0)
        elif time.monotonic() > deadline:
            return None
        else:
            time.sleep(0.001)
    return codes


def _end(children: Sequence[int]) -> None:
    """Confined processes have no children of their own."""
    for child in children:
        os.kill(child, signal.SIGKILL)  # not reaped yet, so its id cannot have been reused
    for child in children:
        os.waitpid(child, 0)


def _send(control: socket.socket, message: object) -> None:
    control.send(json.dumps(message).encode())
