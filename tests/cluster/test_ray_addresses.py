"""Which Ray a command takes, and that it never waits longer than it says for one that is gone."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from orchestration.ray_addresses import (
    address_of_a_run,
    address_to_join,
    local_rays,
    require_answer,
    stays_on_this_machine,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def closed_port() -> Iterator[int]:
    """One at which nothing listens while the test runs."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def test_a_named_address_comes_first_then_that_of_ray_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert address_to_join() is None
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379\n")
    assert address_to_join() == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert address_to_join() == "10.0.0.2:6379"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert address_to_join() is None
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ValueError, match="RAY_ADDRESS='auto' takes any Ray"):
        address_to_join()


def test_what_does_not_answer_is_said(closed_port: int) -> None:
    for address in (f"127.0.0.1:{closed_port}", "no-such-host.invalid:6379", "6379", "host:port"):
        with pytest.raises(ConnectionError, match=f"no Ray answers at {address} .*ray stop"):
            require_answer(address)
    with socket.create_server(("127.0.0.1", 0)) as server:
        require_answer(f"127.0.0.1:{server.getsockname()[1]}")


def fake_raylet(*options: str) -> subprocess.Popen[bytes]:
    """A process that is to be found as one of Ray is: by its command line."""
    body = "import sys; print(flush=True); sys.stdin.read()"
    command = ["/some/where/raylet", "-c", body, *options]
    process = subprocess.Popen(command, executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"\n"
    return process


def test_a_command_takes_the_only_ray_of_the_machine_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    others = set(local_rays())
    if others:
        pytest.skip(f"Ray runs on this machine: {others}")
    with pytest.raises(ConnectionError, match=r"0 Rays run on this machine \(none\); set RAY_ADDRESS"):
        address_of_a_run()
    with ExitStack() as processes:
        processes.enter_context(fake_raylet("--gcs-address=127.0.0.1:1", "--node_ip_address=127.0.0.1"))
        assert address_of_a_run() == "127.0.0.1:1"
        processes.enter_context(fake_raylet("--gcs-address=10.0.0.1:2", "--node_ip_address=10.0.0.1"))
        assert local_rays() == {"127.0.0.1:1": "127.0.0.1", "10.0.0.1:2": "10.0.0.1"}
        with pytest.raises(ConnectionError, match=r"2 Rays run on this machine \(10.0.0.1:2, 127.0.0.1:1\)"):
            address_of_a_run()
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.3:4")
        assert address_of_a_run() == "10.0.0.3:4"
        assert [stays_on_this_machine(a) for a in (None, "127.0.0.1:1", "10.0.0.1:2", "10.0.0.3:4")] == [1, 1, 0, 0]


def command(script: str, *arguments: str, address: str) -> subprocess.CompletedProcess[str]:
    """Run to its end, which must come within the time that this test gives it."""
    environment = os.environ | {"RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}
    whole = [sys.executable, f"orchestration/{script}", *arguments]
    return subprocess.run(whole, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_scaling_a_run_on_a_dead_cluster_is_refused(closed_port: int) -> None:
    refused = command("scale.py", "--rollout-workers", "2", address=f"127.0.0.1:{closed_port}")
    assert refused.returncode == 1 and refused.stderr.startswith("refused: no Ray answers at 127.0.0.1")


def test_scaling_gives_up_at_its_deadline_though_something_listens() -> None:
    """Ray itself would wait for minutes: the other end takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        refused = command("scale.py", "--rollout-workers", "2", "--timeout-s", "8", address=address)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("refused: no answer within 8 s (--timeout-s)")


def test_a_run_on_a_dead_cluster_fails_before_it_starts_anything(closed_port: int, tmp_path: Path) -> None:
    place = ("--logging.output-dir", str(tmp_path / "runs"))
    failed = command("run.py", "orchestration/configs/smoke.toml", *place, address=f"127.0.0.1:{closed_port}")
    assert failed.returncode == 1 and "no Ray answers at 127.0.0.1" in failed.stderr
    assert list((tmp_path / "runs").iterdir()) == []
