"""Processes at work, the loops of each, and what each holds: they join, leave, and may fail at any moment."""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Generic, TypeVar

from orchestration.cluster.remote import ProcessFailure
from orchestration.roles.protocols import Member
from orchestration.tasks import Loop, Loops

AnyMember = TypeVar("AnyMember", bound=Member)
Held = TypeVar("Held")


class Crew(Generic[AnyMember, Held]):
    """All processes of one role that have work."""

    def __init__(
        self,
        loops: Loops,
        *,
        give_back: Callable[[Held, ProcessFailure], Awaitable[None]],
        on_failure: Callable[[Member, ProcessFailure], Loop],
    ) -> None:
        """`give_back(held, failure)`: what the member held when it failed is for others to do. `on_failure` is a loop
        of its own from then on, which no one waits for; what it raises ends the run."""
        self._loops, self._give_back, self._on_failure = loops, give_back, on_failure
        self._members: list[AnyMember] = []
        self._held: dict[Member, Held] = {}

    def __contains__(self, member: object) -> bool:
        return member in self._members

    def __iter__(self) -> Iterator[AnyMember]:
        return iter(list(self._members))

    @property
    def held(self) -> Mapping[str, Held]:
        """What each holds, by its name."""
        return {member.name: held for member, held in self._held.items()}

    def __len__(self) -> int:
        return len(self._members)

    def join(self, member: AnyMember) -> None:
        """It is watched from now on."""
        self._members.append(member)
        self._loops.start(member, self._guarded(member, member.lost()))

    def start(self, member: AnyMember, work: Loop, *others: Loop) -> None:
        """Its loops; `work` takes work and hands it on."""
        self._loops.start_work(member, self._guarded(member, work), *[self._guarded(member, one) for one in others])

    def hold(self, member: AnyMember, held: Held) -> None:
        """It has this to do from now on."""
        self._held[member] = held

    def hand_on(self, member: AnyMember) -> None:
        """It is done with what it held."""
        del self._held[member]

    async def leave(self, member: AnyMember) -> None:
        """Returns when it, or another if it fails, has handed on what it holds."""
        self._members = [other for other in self._members if other is not member]
        await self._loops.end(member)

    async def lose(self, member: Member, failure: ProcessFailure) -> None:
        """It failed: others do what it held. Only the first failure of a member counts, and of one that leaves, only
        for what it held."""
        was_present, held = member in self._members, self._held.pop(member, None)
        if not was_present and held is None:
            return
        self._members = [other for other in self._members if other is not member]
        self._loops.cut(member)
        if held is not None:
            await self._give_back(held, failure)
        if was_present:
            self._loops.start(self, self._on_failure(member, failure))

    async def _guarded(self, member: AnyMember, loop: Loop) -> None:
        try:
            await loop
        except ProcessFailure as failure:
            if failure.process != member.name:  # such as the learner, which sends it weights
                raise
            await self.lose(member, failure)
