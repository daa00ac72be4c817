"""The methods of a remote process on a worker of this process."""

import asyncio
from collections.abc import Generator
from functools import partial

import numpy as np
import pytest

from orchestration.cluster.one_process import LocalObject, OneProcess
from orchestration.cluster.process_specs import ProcessSpec
from orchestration.cluster.remote import arriving
from orchestration.config import PlacementConfig, RoleConfig


class Counter:
    """Counts in an array of its own, of which it yields views."""

    def __init__(self, start: int) -> None:
        self.startup_s = {"imports": 1.0, "model": 2.0}
        self._counts = np.full(2, start)

    def add(self, *amounts: int) -> int:
        self._counts += sum(amounts)
        return int(self._counts[0])

    def reset(self, to: int) -> None:
        if to < 0:
            raise ValueError(f"cannot count from {to}")
        self._counts[:] = to

    def views(self, num: int) -> Generator[np.ndarray, None, str]:
        for _ in range(num):
            yield self._counts
        return "the end"

    def squares(self, numbers: list[int]) -> list[int]:
        return [number**2 for number in numbers]


@pytest.fixture
def counter() -> LocalObject[Counter]:
    build = partial(Counter, start=3)
    return LocalObject("counter 0", ProcessSpec(name="counter", role=RoleConfig(), build=build, environment={}))


def test_calls_reach_the_worker_by_the_function_that_names_them(counter: LocalObject[Counter]) -> None:
    assert asyncio.run(counter.call(Counter.add, 1, 2)) == 6
    assert asyncio.run(counter.call_concurrently(Counter.add, 4)) == 10
    counter.notify(Counter.reset, to=1)
    assert asyncio.run(counter.call(Counter.add)) == 1
    with pytest.raises(ValueError, match="cannot count from -1"):
        counter.notify(Counter.reset, -1)


def test_start_up_is_reported_by_stage_with_all_imports_in_one(counter: LocalObject[Counter]) -> None:
    stages = asyncio.run(counter.startup())
    assert set(stages) == {"process", "imports", "model"}
    assert stages["imports"] >= 1.0 and stages["model"] == 2.0


def test_what_is_streamed_does_not_change_with_the_workers_memory(counter: LocalObject[Counter]) -> None:
    views, last = asyncio.run(counter.stream(Counter.views, 2))
    asyncio.run(counter.call(Counter.add, 5))
    assert [arriving(view).tolist() for view in views] == [[3, 3], [3, 3]]
    assert last == "the end"


def test_each_item_has_its_result_and_its_summary(counter: LocalObject[Counter]) -> None:
    assert asyncio.run(counter.call_each(Counter.squares, [2, 5], str)) == [("4", 4), ("25", 25)]


def test_a_run_in_one_process_neither_grows_nor_shrinks(counter: LocalObject[Counter]) -> None:
    starter = OneProcess(PlacementConfig())
    spec = ProcessSpec(name="counter", role=RoleConfig(), build=partial(Counter, start=0), environment={})
    with pytest.raises(ValueError, match=r"one_process=True\) has no room for one more counter"):
        asyncio.run(starter.add(spec))
    with pytest.raises(ValueError, match=r"one_process=True\) needs its only counter 0"):
        starter.remove(counter)
