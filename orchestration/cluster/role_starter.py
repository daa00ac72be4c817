"""The interface of what hosts the workers of a run: a cluster (`Cluster`), or this process alone (`OneProcess`)."""

from abc import ABC, abstractmethod

from orchestration.cluster.control import DriverControl
from orchestration.cluster.process_specs import ProcessSpec
from orchestration.cluster.remote import Reference, Remote, T


class RoleStarter(ABC):
    """Starts processes and ends them, and holds what they exchange."""

    @abstractmethod
    def start(self, spec: ProcessSpec[T]) -> list[Remote[T]]:
        """`spec.role.count` processes."""

    @abstractmethod
    async def add(self, spec: ProcessSpec[T]) -> Remote[T]:
        """One more process while the run lasts.

        Raises: ValueError, with the numbers, if there is no room for it.
        """

    @abstractmethod
    def remove(self, remote: Remote[object]) -> None:
        """End one of them and release its resources."""

    @abstractmethod
    def control(self, folder: str) -> DriverControl | None:
        """Where requests to scale the run in this folder arrive; None: the run cannot be scaled."""

    @abstractmethod
    def put(self, value: T) -> Reference[T]:
        """A reference to a value, as roles exchange them."""

    @abstractmethod
    async def fetch(self, reference: Reference[T]) -> T:
        """The value of a reference, brought to this process."""

    @abstractmethod
    def close(self) -> None:
        """End everything that was started."""
