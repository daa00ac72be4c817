"""Would the tests notice a wrong sign? One small change at a time in files that need no engine; their tests must fail.

    python benchmarks/mutation_check.py --report docs/mutation_check.md [--files FILE ...] [--max-mutants-per-file N]

Each mutant is one edit of the source: an operator, a comparison, a number, a bound of a slice, min for max, a call left
out. It runs in a fork that has torch and transformers loaded already, sees the edited source in place of the file's (so
nothing is written to disk) and stops at the first failing test. A mutant that outlives all tests of its file is a
survivor: give the file a test, or, if no test can tell the two apart, an entry in `EQUIVALENT` with the reason. Ends
with 1 if there is another survivor, or an entry that excuses nothing.
"""

import gc
import importlib
import os
import random
import resource
import shlex
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it: a mutant must not reach the network

import pytest
import torch
import tyro
from mutants import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[1]

TESTS: dict[str, tuple[str, ...]] = {
    "actors/data/blocks.py": ("test_blocks.py",),
    "actors/data/texts.py": ("test_documents.py",),
    "actors/engine/engine_loop.py": ("test_engine_loop.py",),
    "feature_server/features/pooling.py": ("test_features.py",),
    "feature_server/features/gram.py": ("test_whitening.py",),
    "feature_server/packing.py": ("test_packing.py", "test_packed_forward.py"),
    "feature_server/features/pooled_whitening.py": ("test_pooled_whitening.py",),
    "learner/objective/whitening.py": ("test_whitening.py",),
    "learner/objective/reward.py": ("test_reward.py", "test_gradient_identity.py", "test_whitening.py"),
    "learner/objective/advantage.py": ("test_reward.py", "test_gradient_identity.py"),
    "learner/objective/off_policy.py": ("test_off_policy.py", "test_off_policy_gradient.py"),
    "learner/credit.py": ("test_loss.py",),
    "learner/objective/parity.py": ("test_parity.py",),
    "learner/loss.py": ("test_loss.py",),
    "learner/logprobs.py": ("test_packed_forward.py",),
    "orchestration/buffer/lag_rule.py": ("test_lag_rule.py", "test_rollout_buffer.py"),
    "orchestration/buffer/reuse.py": ("test_reuse.py", "test_rollout_buffer.py"),
    "orchestration/buffer/event_log.py": ("test_replay.py",),
    "orchestration/buffer/replay_buffer.py": ("test_replay.py",),
    "orchestration/roles/weight_sync.py": ("test_weight_sync.py", "test_replay.py"),
    "orchestration/evaluation/intervals.py": ("test_pass_at_k.py",),
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
"""What the tests import and the parent can hold for all of them. Never a package of this project: its shapes are
checked only if it is imported after pytest has started."""

MEMORY_LIMIT_BYTES = 16 * 2**30
"""Address space of a mutant: a changed bound may ask for any amount."""


class Equivalent(NamedTuple):
    """A mutant that no test could tell from the original."""

    file: str
    after: str
    """The changed line, without its indentation."""
    reason: str


FOR_TYPE_CHECKERS = "imports for type checkers only"
AT_TOLERANCE = "a value that equals the tolerance to the last bit"
NEVER_READ = "stands in a place whose result is replaced by 0"

EQUIVALENT: tuple[Equivalent, ...] = (
    Equivalent(
        "orchestration/roles/weight_sync.py",
        "if not TYPE_CHECKING:  # imports Ray and torch, which a simulation does without",
        FOR_TYPE_CHECKERS,
    ),
    Equivalent(
        "feature_server/features/gram.py",
        "ids = completion_ids.masked_fill(past_end, 1)",
        "any one value will do: completions of unequal length are told apart by their lengths",
    ),
    Equivalent(
        "feature_server/features/pooled_whitening.py",
        "if num_rows > num_dimensions:",
        "with as many rows as dimensions both routes give the same numbers",
    ),
    Equivalent(
        "learner/objective/whitening.py",
        "projected_norm_sq = (statistics.ground_truth_products * beta).mean(-1)",
        "only compared with a tolerance of 1e-10, to which a factor n is nothing",
    ),
    Equivalent(
        "learner/objective/whitening.py", "copies = inverse_root.mean(-1)", "only its sign is read, within a tolerance"
    ),
    Equivalent(
        "learner/objective/whitening.py", "(leverage >= EIGENVALUE_TOLERANCE) & seen.unsqueeze(-1),", AT_TOLERANCE
    ),
    Equivalent(
        "learner/objective/whitening.py",
        "(leverage >= EIGENVALUE_TOLERANCE) & (copies.abs() > noise) & (ground_truth_norm > 0),",
        AT_TOLERANCE,
    ),
    Equivalent(
        "learner/objective/whitening.py",
        "(leverage > EIGENVALUE_TOLERANCE) & (copies.abs() >= noise) & (ground_truth_norm > 0),",
        AT_TOLERANCE,
    ),
    Equivalent(
        "learner/objective/whitening.py",
        "inverse = torch.where(leverage >= EIGENVALUE_TOLERANCE, 1 / root_weights, 0.0)",
        AT_TOLERANCE,
    ),
    Equivalent("learner/objective/whitening.py", "ridge = torch.where(zero, 2.0, shrinkage * scale)", NEVER_READ),
    Equivalent(
        "learner/objective/whitening.py",
        "zero[:, None, None], 0.0, whitened_gram / torch.where(zero, 2.0, mean_norm_sq)[:, None, None]",
        NEVER_READ,
    ),
    Equivalent(
        "learner/credit.py",
        'low, high = config.ratio_bounds or PUBLISHED_BOUNDS.get(config.correction, (1.0, float("inf")))',
        "corrections without published bounds read none",
    ),
    Equivalent(
        "orchestration/evaluation/intervals.py",
        "return Interval(mean, max(0.0, min(mean, centre - reach)), min(2.0, max(mean, centre + reach)))",
        "the upper bound exceeds 1 by rounding only",
    ),
    Equivalent(
        "orchestration/evaluation/intervals.py", "for _ in range(101):", "100 halvings are below rounding already"
    ),
    Equivalent(
        "orchestration/evaluation/intervals.py",
        "low, high = (middle, high) if _probability_within(middle, degrees=degrees) <= within else (low, middle)",
        "equality would have to be exact, and either side is then a bound",
    ),
    Equivalent(
        "learner/credit.py",
        "learner_logprobs=learner_logprobs.double().cpu(),",
        "the corrections detach what they are given; here it only frees the graph sooner",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """Mutate the files of TESTS and run their tests."""

    files: tuple[str, ...] = tuple(TESTS)
    """Which of them."""
    report: Path | None = None
    """Where the tables go, besides the terminal."""
    max_mutants_per_file: int | None = None
    """None: all; otherwise that many, drawn at random."""
    seed: int = 0
    """Of that draw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """What became of one file's mutants."""

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
    """In the fork: run the tests, say nothing, end with their exit code."""
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    code = 1
    try:
        gc.freeze()  # what the parent holds is looked through once at every end of pytest otherwise
        _put_in_place(ROOT / file, source)
        paths = [str(ROOT / "tests" / name) for name in TESTS[file]]
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
    """All of them, or as many as asked for."""
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


def page(examined: list[Examined], command: str) -> str:
    """The tables as docs/mutation_check.md shows them."""
    rows, kept, missed = [], [], []
    for one in examined:
        excused = [(mutant, entry) for mutant in one.survivors if (entry := excuse(one.file, mutant))]
        unexcused = [mutant for mutant in one.survivors if not excuse(one.file, mutant)]
        counts = (one.num_mutants, one.num_mutants - len(one.survivors), len(excused), len(unexcused))
        rows.append([f"`{one.file}`", ", ".join(f"`{name}`" for name in TESTS[one.file]), *map(str, counts)])
        kept += [[f"`{one.file}`", _code(m.before), _code(m.after), entry.reason] for m, entry in excused]
        missed += [[f"`{one.file}:{m.line}`", _code(m.before), _code(m.after)] for m in unexcused]
    total, late = sum(one.num_mutants for one in examined), sum(one.num_late for one in examined)
    parts = [
        "# Would the tests notice?",
        "Files with one small edit at a time (an operator, a comparison, a number, a bound, min for max, a call "
        "left out), and\nthe unit tests that belong to them. Made by",
        f"```bash\n{command}\n```",
        f"{total} mutants: {total - len(kept) - len(missed)} killed ({late} by a time limit), {len(kept)} equivalent, "
        f"{len(missed)} survived.",
        _table(["file", "tests", "mutants", "killed", "equivalent", "survived"], rows),
    ]
    if missed:
        parts += ["## Survived", _table(["place", "line", "mutant"], missed)]
    if kept:
        parts += ["## Equivalent: no test can tell them apart", _table(["file", "line", "mutant", "why"], kept)]
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _code(line: str) -> str:
    return "`" + line.replace("|", "\\|") + "`"


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
    text = page(examined, shlex.join(["python", "benchmarks/mutation_check.py", *sys.argv[1:]]))
    print(text)
    if check.report:
        check.report.write_text(text, encoding="utf-8")
    unused = [] if check.max_mutants_per_file is not None else unused_excuses(check.files, examined)
    for entry in unused:
        print(f"EQUIVALENT excuses nothing: {entry.file}: {entry.after}")
    survived = any(excuse(one.file, mutant) is None for one in examined for mutant in one.survivors)
    return 1 if survived or unused else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Check)))
