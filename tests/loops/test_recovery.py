"""Another process in the place of each that failed, in virtual time: when it starts, how often, and what ends a run."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from staffed_run import Job, MakeDocument, no_log

from orchestration.cluster.remote import ProcessLost
from orchestration.simulator.virtual_time import run_in_virtual_time
from orchestration.supervision.recovery import MAX_WAIT_S, Recovery
from orchestration.supervision.staff import StaffedRole

MINUTE_S = 60.0


@dataclass(eq=False)
class Process:
    """Process and member in one."""

    name: str
    num_done: int = 0
    fails: bool = False

    @property
    def remote(self) -> "Process":
        return self

    async def startup(self) -> dict[str, float]:
        if self.fails:
            raise RuntimeError(f"{self.name} died during startup()")
        return {}


@dataclass
class Team:
    """One role: doubles as staff and as starter, and notes when what was started and ended."""

    count: int = 1
    broken: Callable[[int], bool] = lambda number: False
    """Processes that do not come up, by number."""
    started: list[tuple[float, str]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    num_done: int = 1
    """Of each that is up."""

    def __post_init__(self) -> None:
        self.members = [Process(f"worker {i}", self.num_done) for i in range(self.count)]
        self.role = StaffedRole(
            starter=self,
            spec=SimpleNamespace(name="worker"),
            present=self.members,
            wanted=len(self.members),
            add=self._add,
            remove=None,
        )

    def role_of(self, member: Process) -> StaffedRole | None:
        return self.role if member in self.members else None

    async def add(self, spec: object) -> Process:
        number = self.count + len(self.started)
        self.started.append((asyncio.get_running_loop().time(), f"worker {number}"))
        return Process(f"worker {number}", self.num_done, fails=self.broken(number))

    def remove(self, process: Process) -> None:
        self.ended.append(process.name)

    async def _add(self, process: Process, asked_at: float) -> None:
        self.members.append(process)

    @property
    def start_times(self) -> list[float]:
        return [time for time, _ in self.started]


def loss_of(process: Process) -> ProcessLost:
    return ProcessLost(process.name, f"{process.name} died of {process.name[-1]}")


async def fail(recovery: Recovery, process: Process) -> None:
    await recovery.replace(process, loss_of(process))


def play(scenario: Coroutine[None, None, None]) -> None:
    run_in_virtual_time(scenario)


def test_what_fails_again_and_again_is_started_less_and_less_often() -> None:
    team = Team(num_done=0)

    async def scenario() -> None:
        recovery = Recovery(team, max_per_hour=100, log=no_log())
        team.members[0].num_done = 7
        for _ in range(9):
            await fail(recovery, team.members[0])
        team.members[0].num_done = 1
        await fail(recovery, team.members[0])

    play(scenario())
    waits = [after - before for before, after in zip([0.0, *team.start_times], team.start_times, strict=False)]
    assert waits == [0, 1, 2, 4, 8, 16, 32, MAX_WAIT_S, MAX_WAIT_S, 0]
    assert team.ended == [f"worker {i}" for i in range(10)]


def test_what_does_not_come_up_is_tried_again_later() -> None:
    team = Team(broken=lambda number: number < 4)
    play(fail(Recovery(team, max_per_hour=100, log=no_log()), team.members[0]))
    assert team.started == [(0.0, "worker 1"), (1.0, "worker 2"), (3.0, "worker 3"), (7.0, "worker 4")]
    assert [member.name for member in team.members] == ["worker 4"]
    assert team.ended == ["worker 0", "worker 1", "worker 2", "worker 3"]


def test_a_role_has_so_many_replacements_within_an_hour(caplog: pytest.LogCaptureFixture) -> None:
    team = Team(count=6)

    async def scenario() -> None:
        recovery = Recovery(team, max_per_hour=3, log=no_log())
        for _ in range(8):
            await fail(recovery, team.members[0])
            await asyncio.sleep(10 * MINUTE_S)

    play(scenario())
    assert team.start_times == [0.0, 10 * MINUTE_S, 20 * MINUTE_S, 60 * MINUTE_S, 70 * MINUTE_S]
    assert len(team.members) == 6 - 3
    assert caplog.text.count("no more replacements within this hour (recovery.max_replacements=3)") == 3
    assert "the run goes on with 5 worker(s)" in caplog.text


@pytest.mark.parametrize("max_per_hour", [0, 3])
def test_when_the_last_one_is_gone_the_run_ends_with_the_first_reason_and_the_last(max_per_hour: int) -> None:
    team = Team(count=2, broken=lambda number: True)

    async def scenario() -> None:
        recovery = Recovery(team, max_per_hour=max_per_hour, log=no_log())
        first, second = team.members
        await fail(recovery, first)
        assert team.members == [second]
        await fail(recovery, second)

    with pytest.raises(RuntimeError) as caught:
        play(scenario())
    for part in ("no worker is left", f"max_replacements={max_per_hour}", "The first failure was: worker 0 died of 0"):
        assert part in str(caught.value)
    assert str(caught.value).endswith("The last: worker 1 died of 1")


def test_one_that_is_still_to_be_started_is_someone_left() -> None:
    """Two fail together; the one replacement that is allowed waits before it starts."""
    team = Team(count=2, num_done=0)

    async def scenario() -> None:
        recovery = Recovery(team, max_per_hour=1, log=no_log())
        await asyncio.gather(*[fail(recovery, member) for member in list(team.members)])

    play(scenario())
    assert [member.name for member in team.members] == ["worker 2"]


@pytest.mark.parametrize("wanted", [1, 2])
def test_one_that_is_not_wanted_any_more_when_it_may_start_is_not_started(wanted: int) -> None:
    team = Team(count=2, num_done=0)

    async def scenario() -> None:
        replacing = asyncio.create_task(fail(Recovery(team, max_per_hour=9, log=no_log()), team.members[0]))
        await asyncio.sleep(0.5)
        assert team.role.num_coming == 1
        team.role.wanted = wanted
        await replacing

    play(scenario())
    assert len(team.members) == wanted
    assert team.start_times == [1.0] * (wanted - 1)


def test_one_that_was_leaving_is_not_replaced() -> None:
    team, stranger = Team(), Process("worker 9")
    play(fail(Recovery(team, max_per_hour=9, log=no_log()), stranger))
    assert (team.started, team.ended) == ([], [])


# -- in a run -----------------------------------------------------------------------------------------------------


def test_a_run_replaces_what_dies_and_trains_to_the_end(
    make_document: MakeDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def worker_dies(job: Job) -> None:
        job.workers[-1].die()

    async def server_dies(job: Job) -> None:
        job.servers[-1].die()

    after_steps = {2: worker_dies, 4: server_dies, 6: worker_dies, 7: worker_dies}
    job = Job(make_document).play(monkeypatch, after_steps=after_steps)
    assert [event[1] for event in job.events if event[0] == "step"] == list(range(13))
    assert [worker.name for worker in job.workers] == ["rollout worker 3"]
    assert [server.name for server in job.servers] == ["feature server 1"]
    for name in ("rollout worker 1", "rollout worker 2", "rollout worker 3"):
        assert [event[0] for event in job.of(name)[:3]] == ["up", "weights", "sample"]
    assert [event[0] for event in job.of("feature server 1")[:3]] == ["up", "whitening", "score"]
    removed = [event[1] for event in job.events if event[0] == "removed"]
    assert removed == ["rollout worker 0", "feature server 0", "rollout worker 1", "rollout worker 2"]


def test_a_run_ends_with_the_first_and_the_last_reason_when_nobody_is_left(
    make_document: MakeDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(job: Job) -> None:
        job.workers[0].die(f"step {job.events[-1][1]}")

    job = Job(make_document, max_replacements=1)
    with pytest.raises(RuntimeError) as caught:
        job.play(monkeypatch, after_steps={2: die, 5: die})
    assert "The first failure was: rollout worker 0 died: step 2. The last: rollout worker 1 died: step 5" in str(
        caught.value
    )
    assert ("step", 5) in job.events and ("step", 6) not in job.events
