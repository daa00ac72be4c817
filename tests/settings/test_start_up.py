"""What the four commands have in common before they do anything: version, log level, tracebacks when asked."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("run", "evaluate", "scale", "simulate")
REFUSED = ("simulate", "--times.sample-s", "1")


def command(name: str, *arguments: str, log_level: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "ASYNC_EBFT_LOG_LEVEL"}
    if log_level is not None:
        environment["ASYNC_EBFT_LOG_LEVEL"] = log_level
    arguments = (str(ROOT / "orchestration" / f"{name}.py"), *arguments)
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_its_version(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    answer = command(name, "--version")
    assert (answer.returncode, answer.stdout) == (0, f"{project['name']} {project['version']}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_explains_the_log_level(name: str) -> None:
    answer = command(name, "--help")
    assert answer.returncode == 0
    assert "ASYNC_EBFT_LOG_LEVEL=debug" in answer.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_a_log_level_that_does_not_exist_is_refused(name: str) -> None:
    answer = command(name, "--help", log_level="loud")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "ASYNC_EBFT_LOG_LEVEL='loud' must be one of debug, info, warning, error" in answer.stderr


@pytest.mark.parametrize(
    ("log_level", "traced"), [("debug", True), ("DEBUG", True), ("info", False), ("", False), (None, False)]
)
def test_a_refusal_shows_its_traceback_at_level_debug_only(log_level: str | None, traced: bool) -> None:
    answer = command(*REFUSED, log_level=log_level)
    assert answer.returncode == 2
    assert "configuration refused: no time is given for stage score" in answer.stderr
    assert ("Traceback (most recent call last)" in answer.stderr) == traced
    assert ("parse_simulation" in answer.stderr) == traced


@pytest.mark.parametrize(
    ("log_level", "shown"),
    [("debug", "ours debug, ours info, theirs info"), (None, "ours info, theirs info"), ("error", "")],
)
def test_the_level_of_debug_is_for_this_project_and_not_for_its_libraries(log_level: str | None, shown: str) -> None:
    code = """
import logging
from orchestration.start_up import start_command
start_command([])
for name, logger in (("ours", "orchestration.session"), ("theirs", "some.library")):
    logging.getLogger(logger).debug(f"{name} debug")
    logging.getLogger(logger).info(f"{name} info")
"""
    environment = {key: value for key, value in os.environ.items() if key != "ASYNC_EBFT_LOG_LEVEL"}
    environment |= {"ASYNC_EBFT_LOG_LEVEL": log_level} if log_level else {}
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ", ".join(" ".join(line.split()[1:]) for line in answer.stderr.splitlines()) == shown
