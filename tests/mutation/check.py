"""Would the tests notice a wrong sign? One small change at a time in files that need no engine; their tests must fail.

    python tests/mutation/check.py [--files FILE ...] [--max-mutants-per-file N]

Each mutant is one edit of the source: an operator, a comparison, a number, a bound of a slice, min for max, a call left
out. It runs in a fork that has torch and transformers loaded already, sees the edited source in place of the file's (so
nothing is written to disk) and stops at the first failing test. A mutant that outlives all tests of its file is a
survivor: give the file a test, or, if no test can tell the two apart, an entry in equivalent.py with the reason. Ends
with 1 if there is another survivor, or an entry that excuses nothing.
"""

import gc
import importlib
import os
import random
import resource
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it: a mutant must not reach the network

import pytest
import torch
import tyro
from equivalent import EQUIVALENT, Equivalent
from mutants import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[2]

TESTS: dict[str, tuple[str, ...]] = {
    "actors/data/blocks.py": ("test_blocks.py",),
    "actors/data/texts.py": ("test_documents.py",),
    "actors/engine/engine_lock.py": ("test_engine_loop.py",),
    "actors/engine/engine_loop.py": ("test_engine_loop.py",),
    "actors/engine/request_batch.py": ("test_engine_loop.py",),
    "actors/engine/weight_load.py": ("test_engine_loop.py",),
    "feature_server/features/pooling.py": ("test_features.py",),
    "feature_server/features/gram.py": ("test_whitening.py",),
    "feature_server/packing.py": ("test_packing.py", "test_packed_forward.py"),
    "feature_server/features/pooled_whitening.py": ("test_pooled_whitening.py",),
    "learner/objective/whitening.py": ("test_whitening.py",),
    "learner/objective/reward.py": ("test_reward.py", "test_gradient_identity.py", "test_whitening.py"),
    "learner/objective/advantage.py": ("test_reward.py", "test_gradient_identity.py"),
    "learner/objective/importance.py": ("test_off_policy.py", "test_off_policy_gradient.py"),
    "learner/objective/off_policy.py": ("test_off_policy.py", "test_off_policy_gradient.py"),
    "learner/rewards.py": ("test_loss.py", "test_parity.py"),
    "learner/credit.py": ("test_loss.py",),
    "learner/objective/parity.py": ("test_parity.py",),
    "learner/loss.py": ("test_loss.py",),
    "learner/logprobs.py": ("test_packed_forward.py",),
    "orchestration/buffer/admission.py": ("test_admission.py", "test_rollout_buffer.py"),
    "orchestration/buffer/lag_rule.py": ("test_lag_rule.py", "test_rollout_buffer.py"),
    "orchestration/buffer/reuse.py": ("test_reuse.py", "test_rollout_buffer.py"),
    "orchestration/buffer/event_log.py": ("test_replay.py",),
    "orchestration/buffer/replay_buffer.py": ("test_replay.py",),
    "orchestration/roles/weight_sync.py": ("test_weight_sync.py", "test_replay.py"),
    "orchestration/evaluation/intervals.py": ("test_intervals.py",),
    "orchestration/evaluation/pass_at_k.py": ("test_pass_at_k.py",),
}
"""File -> the tests that belong to it, the ones that fail soonest first: all pure files, and the loops and logs whose
tests have no engine."""

PRELOADED = (
    "beartype",
    "jaxtyping",
    "torch.utils.checkpoint",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
)
"""What the tests import and the parent can load for all of them. Never a package of this project: its shapes are
checked only if it is imported after pytest has started."""

MEMORY_LIMIT_BYTES = 16 * 2**30
"""Address space of a mutant: a changed bound may ask for any amount."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Mutate the files of TESTS and run their tests."""

    files: tuple[str, ...] = tuple(TESTS)
    """Which of them."""
    max_mutants_per_file: int | None = None
    """None: all; otherwise that many, drawn at random."""
    seed: int = 0
    """Of that draw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """Results of one file's mutants."""

    file: str
    num_mutants: int
    num_late: int
    """Killed by the time limit."""
    survivors: list[Mutant]


def passes(file: str, source: bytes, *, basetemp: Path, limit_s: float) -> bool | None:
    """Whether the tests of a file pass with this source in its place; None if they outlast the limit."""
    child = os.fork()
    if child == 0:
        _become_the_tests(file, source, basetemp)
    ended, deadline = 0, time.monotonic() + limit_s
    try:
        while not ended and time.monotonic() < deadline:
            time.sleep(0.01)
            ended, status = os.waitpid(child, os.WNOHANG)
    finally:  # on the limit, and when someone stops the whole check
        if not ended:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == pytest.ExitCode.OK if ended else None


def _become_the_tests(file: str, source: bytes, basetemp: Path) -> None:
    """In the fork: run the tests silently, end with their exit code."""
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    code = 1
    try:
        gc.freeze()  # what the parent holds is looked through once at every end of pytest otherwise
        _put_in_place(ROOT / file, source)
        paths = [str(path) for name in TESTS[file] for path in (ROOT / "tests").rglob(name)]
        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:anyio", "-m", "not engine and not gpu"]
        code = int(pytest.main([*paths, *options, f"--basetemp={basetemp}"]))
    finally:
        os._exit(code)


def _put_in_place(path: Path, source: bytes) -> None:
    """Let every later import of this file, with or without checks of shapes, read this source instead."""
    read = SourceFileLoader.get_data

    def get_data(loader: SourceFileLoader, wanted: str) -> bytes:
        if Path(wanted) == path:
            return source
        if Path(wanted).parent == path.parent / "__pycache__" and Path(wanted).name.startswith(f"{path.stem}."):
            raise FileNotFoundError(wanted)  # bytecode of the original
        return read(loader, wanted)

    SourceFileLoader.get_data = get_data
    sys.dont_write_bytecode = True


def time_limit(file: str, source: bytes, *, basetemp: Path) -> float:
    """Seconds that a mutant of this file may take.

    Raises: RuntimeError if its tests fail without an edit, or pass without the file.
    """
    start = time.monotonic()
    if not passes(file, source, basetemp=basetemp, limit_s=600):
        raise RuntimeError(f"the tests of {file} fail as it is: {', '.join(TESTS[file])}; repair them first")
    limit_s = 10 + 4 * (time.monotonic() - start)
    if passes(file, b"raise ImportError", basetemp=basetemp, limit_s=limit_s):
        raise RuntimeError(f"{', '.join(TESTS[file])} pass without {file}; correct the table TESTS")
    return limit_s


def examine(file: str, mutants: list[Mutant], *, basetemp: Path, limit_s: float) -> Examined:
    """Run these mutants of a file."""
    survivors, num_late = [], 0
    for number, mutant in enumerate(mutants, start=1):
        passed = passes(file, mutant.source, basetemp=basetemp, limit_s=limit_s)
        num_late += passed is None
        survivors += [mutant] if passed else []
        verdict = {True: "SURVIVED", False: "killed", None: "killed by time"}[passed]
        print(f"{number}/{len(mutants)} {file}:{mutant.line} {verdict}: {mutant.after}", flush=True)
    return Examined(file=file, num_mutants=len(mutants), num_late=num_late, survivors=survivors)


def draw(mutants: list[Mutant], check: Check) -> list[Mutant]:
    """All of them, or the requested number."""
    if check.max_mutants_per_file is None or len(mutants) <= check.max_mutants_per_file:
        return mutants
    return sorted(random.Random(check.seed).sample(mutants, check.max_mutants_per_file))


def excuse(file: str, mutant: Mutant) -> Equivalent | None:
    """The entry that says why no test could kill this one."""
    return next((entry for entry in EQUIVALENT if (entry.file, entry.after) == (file, mutant.after)), None)


def unused_excuses(files: tuple[str, ...], examined: list[Examined]) -> list[Equivalent]:
    """Entries for these files that no survivor needs."""
    needed = {excuse(one.file, mutant) for one in examined for mutant in one.survivors}
    return [entry for entry in EQUIVALENT if entry.file in files and entry not in needed]


def summary(examined: list[Examined]) -> str:
    """A line for each file, one for all of them, and the mutants that nothing excuses."""
    lines, num_excused, missed = [], 0, []
    for one in examined:
        unexcused = [mutant for mutant in one.survivors if excuse(one.file, mutant) is None]
        num_excused += len(one.survivors) - len(unexcused)
        missed += [f"SURVIVED {one.file}:{m.line}: {m.before}  ->  {m.after}" for m in unexcused]
        lines.append(
            f"{one.file}: {one.num_mutants} mutants, {len(one.survivors)} survived, {len(unexcused)} unexcused"
        )
    total, late = sum(one.num_mutants for one in examined), sum(one.num_late for one in examined)
    killed = total - num_excused - len(missed)
    lines.append(
        f"{total} mutants: {killed} killed ({late} by a time limit), {num_excused} equivalent, {len(missed)} survived"
    )
    return "\n".join(lines + missed)


def main(check: Check) -> int:
    """Exit code: 1 if a mutant survived that should not have."""
    torch.set_num_threads(1)  # a fork of a process with threads of its own may hang
    for name in PRELOADED:
        importlib.import_module(name)
    os.chdir(ROOT)
    sources = {file: (ROOT / file).read_bytes() for file in check.files}
    with tempfile.TemporaryDirectory() as folder:
        basetemp = Path(folder, "pytest")
        limits = {file: time_limit(file, source, basetemp=basetemp) for file, source in sources.items()}
        examined = [
            examine(file, draw(mutants_of(source), check), basetemp=basetemp, limit_s=limits[file])
            for file, source in sources.items()
        ]
    print(summary(examined))
    unused = [] if check.max_mutants_per_file is not None else unused_excuses(check.files, examined)
    for entry in unused:
        print(f"EQUIVALENT excuses nothing: {entry.file}: {entry.after}")
    survived = any(excuse(one.file, mutant) is None for one in examined for mutant in one.survivors)
    return 1 if survived or unused else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Check)))
