"""How long a call may take: a multiple of what is usual for it, and until that is known, what the user allows."""

FACTOR = 10.0
"""A call is given up after this many times the longest of its kind so far, per item that it was given."""
SHORTEST_S = 30.0
"""No call is given up before this time [s]: a busy machine may stall any of them for a while."""


class Deadlines:
    """Of the calls to all processes of one role, by method."""

    def __init__(self, longest_s: float) -> None:
        """`longest_s`: of any call (asynchrony.request_timeout_s)."""
        self._longest_s = longest_s
        self._usual_s: dict[str, float] = {}

    def of(self, method: str, *, items: int = 1) -> float:
        """Of a call with so many items [s]."""
        usual_s = self._usual_s.get(method)
        if usual_s is None:
            return self._longest_s
        return min(self._longest_s, max(SHORTEST_S, FACTOR * usual_s * items))

    def note(self, method: str, seconds: float, *, items: int = 1) -> None:
        """A call that ended well took so long."""
        self._usual_s[method] = max(self._usual_s.get(method, 0.0), seconds / items)
