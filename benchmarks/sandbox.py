"""Programs that the sandbox runs in a second, one at a time and two side by side.

    python benchmarks/sandbox.py [--programs 100] [--repeats 5]

A program is a function of a line, its tests are two assertions: what is measured is the cost around them. Neither Ray
nor a GPU is needed; it takes seconds.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro  # noqa: E402

from benchmarks.measured import median_and_range  # noqa: E402
from feature_server.verifiers.sandbox import Sandbox, program_sandbox  # noqa: E402

PROGRAM = "def double(x):\n    return 2 * x\n"
TESTS = "assert double(3) == 6\nassert double('a') == 'aa'\n"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Measure the speed of the sandbox."""

    programs: int = 100
    """In one repeat."""
    repeats: int = 5


def programs_per_s(sandbox: Sandbox, threads: int, programs: int) -> float:
    """Over one repeat."""

    def passes(_: int) -> bool:
        return sandbox.run(PROGRAM, TESTS, timeout_s=10.0, memory_mib=512).status == "passed"

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        assert all(pool.map(passes, range(programs)))
    return programs / (time.perf_counter() - start)


def main(settings: Measurement) -> None:
    """Print a line for each number of threads."""
    for threads in (1, 2):
        sandbox = program_sandbox()
        programs_per_s(sandbox, threads, threads)  # starts the warm processes
        rates = [programs_per_s(sandbox, threads, settings.programs) for _ in range(settings.repeats)]
        print(f"{threads} at a time: {median_and_range(rates, decimals=0)} programs/s")


if __name__ == "__main__":
    main(tyro.cli(Measurement))
