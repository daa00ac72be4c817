"""The scorers of reasoning-gym's tasks, as a function of two strings.

Some of them evaluate the text they are given, so they run in a confined process only: see verifiers.py.
"""

import functools
import json
import math
from collections.abc import Callable


def make_scorer() -> Callable[[str, str], float]:
    """A function (completion, answer) -> score; the answer is an entry of a reasoning-gym dataset as JSON.

    The score is NaN where the task's scorer raised. The function raises ValueError if the answer is no entry.
    """
    import reasoning_gym  # optional, and slow (2 s)

    scorer_of = functools.cache(reasoning_gym.get_score_answer_fn)

    def score(completion: str, answer: str) -> float:
        entry = json.loads(answer)
        scorer = scorer_of(task_of(entry))
        try:
            return float(scorer(answer=completion.strip(), entry=entry))
        except Exception:  # noqa: BLE001  they parse the text as they like: what they raise means that it is no answer
            return math.nan

    return score


def task_of(entry: object) -> str:
    """The name of the task, which reasoning-gym puts next to the question or into the metadata.

    Raises: ValueError if the entry is not one of reasoning-gym.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("metadata", {}), dict) or "answer" not in entry:
        raise ValueError(f"the answer must be a reasoning-gym entry as a JSON object, got {json.dumps(entry)[:200]}")
    fields = {**entry.get("metadata", {}), **entry}
    if "source_dataset" not in fields:
        raise ValueError(f"the reasoning-gym entry names no source_dataset, it has {sorted(fields)}")
    return fields["source_dataset"]
