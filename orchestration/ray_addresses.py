"""Which Ray a command joins, told before Ray itself is imported; and whether anything answers there.

Ray waits for minutes for a cluster that is gone, and without an address may take any that it finds. So commands of
this project decide themselves. Standard library only.
"""

import os
import socket
import tempfile
from pathlib import Path

ANSWER_TIMEOUT_S = 10.0
"""Longest wait for a connection to a cluster [s]."""


def address_to_join() -> str | None:
    """`host:port` of the cluster to join: RAY_ADDRESS, or that of the last `ray start`; None: start one.

    Raises: ValueError for RAY_ADDRESS=auto, which names none.
    """
    named = os.environ.get("RAY_ADDRESS", "")
    if named == "auto":
        raise ValueError(
            "RAY_ADDRESS='auto' takes any Ray of this machine; set it to host:port of the one you mean, or unset it"
        )
    if named == "local":
        return None
    return named or _last_started()


def _last_started() -> str | None:
    """What `ray start` noted, until `ray stop`."""
    note = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray", "ray_current_cluster")
    return note.read_text(encoding="utf-8").strip() if note.exists() else None


def address_of_a_run() -> str:
    """Where a run that goes on is to be found: RAY_ADDRESS, or the one Ray that runs on this machine.

    Raises: ConnectionError if there is none, or several, which are named; ValueError as `address_to_join`.
    """
    if os.environ.get("RAY_ADDRESS") and (named := address_to_join()):
        return named
    found = sorted(local_rays())
    if len(found) != 1:
        raise ConnectionError(
            f"{len(found)} Rays run on this machine ({', '.join(found) or 'none'}); set RAY_ADDRESS to the one that "
            "the run's log names"
        )
    return found[0]


def local_rays() -> dict[str, str]:
    """Cluster address -> address of the node here, of every Ray node that runs on this machine."""
    nodes = {}
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            program, *arguments = command_line.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it ended meanwhile
            continue
        options = dict(argument.lstrip("-").split("=", 1) for argument in arguments if "=" in argument)
        if Path(program).name == "raylet" and "gcs-address" in options:
            nodes[options["gcs-address"]] = options.get("node_ip_address", "")
    return nodes


def stays_on_this_machine(address: str | None) -> bool:
    """Whether a run there needs no other interface than the loopback: its own Ray, or one that listens nowhere else."""
    return address is None or local_rays().get(address, "").startswith("127.")


def require_answer(address: str) -> None:
    """Raises: ConnectionError if nothing takes a connection at `host:port` within ANSWER_TIMEOUT_S."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no Ray answers at {address} ({error}), which RAY_ADDRESS or the last `ray start` names; start that "
            "cluster, correct or unset RAY_ADDRESS, or run `ray stop` to forget a cluster that is gone"
        ) from error
