"""A run on one machine, as others on the network and readers of its files see it."""

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from own_cluster import SMOKE, Finished, descendants, own_environment, run, run_command
from whole_runs import few_texts

pytestmark = pytest.mark.engine

SECRETS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "RAY_AUTH_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "MY_PASSWORD",
)


@pytest.fixture(scope="module")
def planted() -> dict[str, str]:
    """Secrets of the user's environment."""
    return {name: secrets.token_hex(32 if name == "RAY_AUTH_TOKEN" else 20) for name in SECRETS}


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    """Not pytest's: the names of Ray's sockets below it would become too long."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def watched(
    planted: dict[str, str], ray_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Finished, Path, set[tuple[str, str]]]:
    """A run that starts its own Ray, the folder of its results, and what listened where meanwhile."""
    folder = tmp_path_factory.mktemp("run")
    listening: set[tuple[str, str]] = set()
    others = set(descendants(psutil.Process()))
    """Such as a cluster of other tests, which starts processes of its own meanwhile."""

    def look() -> None:
        for process in set(descendants(psutil.Process())) - others:
            if others.isdisjoint(ancestors(process)):
                listening.update(listens(process))

    arguments = (SMOKE, *few_texts(tmp_path_factory.mktemp("data")), "--asynchrony.weight-transport", "gloo")
    place = ("--logging.output-dir", str(folder), "--logging.wandb", "offline")
    proxy = f"http://me:{planted[SECRETS[-1]]}@127.0.0.1:9"  # as tools are given it
    environment = own_environment(**planted, FTP_PROXY=proxy, RAY_TMPDIR=str(ray_folder), ASYNC_EBFT_LOG_LEVEL="debug")
    finished = run(run_command(*arguments, *place), environment=environment, timeout_s=400, meanwhile=look)
    assert finished.returncode == 0, finished.output
    return finished, folder, listening


def ancestors(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.parents()
    except psutil.NoSuchProcess:
        return []


def listens(process: psutil.Process) -> Iterator[tuple[str, str]]:
    """Name and address of each socket on which the process takes connections."""
    try:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                yield process.name(), connection.laddr.ip
    except psutil.NoSuchProcess:
        pass


def test_nothing_of_a_run_on_one_machine_listens_to_others(
    watched: tuple[Finished, Path, set[tuple[str, str]]],
) -> None:
    _, _, listening = watched
    names = {name for name, _ in listening}
    assert {"raylet", "gcs_server"} <= names and any("Learner" in name for name in names), names
    assert {ip for _, ip in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listening


def test_no_secret_is_written_anywhere(
    watched: tuple[Finished, Path, set[tuple[str, str]]], planted: dict[str, str], ray_folder: Path
) -> None:
    finished, folder, _ = watched
    written = [path for place in (folder, ray_folder) for path in place.rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert {"config.toml", "metrics.jsonl", "summary.json"} <= names, names
    assert any("wandb" in str(path) for path in written) and any("session_" in str(path) for path in written)
    texts = {str(path): path.read_bytes() for path in written} | {"its output": finished.output.encode()}
    assert [(place, name) for place, text in texts.items() for name in planted if planted[name].encode() in text] == []
