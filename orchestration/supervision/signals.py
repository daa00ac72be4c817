"""SIGTERM, SIGHUP and Ctrl-C: the first asks the run to save and end, the second ends it at once.

While there is nothing to save, the first one ends it too. A signal that the process was started to ignore, as `nohup`
does with SIGHUP, stays ignored.
"""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
SAVE_S = 25.0
"""How long a run may take to save after the first signal [s]."""


class StoppedBySignal(KeyboardInterrupt):
    """Raised where the main thread is when a signal ends it at once; event loops let it pass."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        """Of the signal."""


class StopSignals:
    """What a signal does now."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The first signal."""
        self._on_stop: Callable[[], None] | None = None
        self._handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]

    def install(self) -> None:
        """Handle the signals from now on; again after Ray has started, which handles some by itself."""
        for number in self._handled:
            signal.signal(number, self._handle)

    @contextmanager
    def asking(self, on_stop: Callable[[], None]) -> Iterator[None]:
        """Inside, the first signal calls this, in the middle of whatever runs, rather than ending the run."""
        self._on_stop = on_stop
        try:
            yield
        finally:
            self._on_stop = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            logger.warning("%s: ending at once; the last checkpoint that is whole stays", name)
            raise StoppedBySignal(number)
        self.received = number
        if self._on_stop is None:
            logger.warning("%s: ending; nothing has been trained that is not saved", name)
            raise StoppedBySignal(number)
        logger.warning("%s: saving, then ending, within %.0f s; another ends at once", name, SAVE_S)
        self._on_stop()


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Handled inside, as before outside."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signals = StopSignals()
    signals.install()
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
