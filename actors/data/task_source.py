"""Procedurally generated problems of the package reasoning-gym, any number of them, scored by the task's own scorer.

Problem i is a function of (task, options, seed, i): every machine generates the same ones.
"""

import json
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING

from actors.data.texts import Pair

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

Options = Mapping[str, int | float | bool | str]


def task_pairs(task: str, options: Options, *, size: int, seed: int, prompt_template: str) -> Iterator[Pair]:
    """Pairs named `reasoning_gym/TASK/seed:index`: question, answer, and the problem as JSON for a verifier.

    Raises: ModuleNotFoundError if reasoning-gym is not installed; ValueError for a task or options that it refuses,
    and for a task without text answers or whose scorer rejects its own answer after a round trip through JSON.
    """
    gym = _reasoning_gym()
    problems = _problems(gym, task, options, size=size, seed=seed)
    for index in range(size):
        problem = problems[index]
        record = {"source_dataset": task} | {key: problem[key] for key in ("question", "answer", "metadata")}
        if not isinstance(record["answer"], str):
            raise ValueError(
                f"problem {index} of task {task!r} comes with the answer {record['answer']!r} instead of a text: "
                "there is no ground truth to match; choose another task"
            )
        answer = json.dumps(record)
        if index == 0:
            _check_scorer(gym, task, answer)
        yield Pair(
            name=f"reasoning_gym/{task}/{seed}:{index}",
            prompt=prompt_template.replace("{question}", record["question"]),
            completion=record["answer"],
            answer=answer,
        )


def _reasoning_gym() -> ModuleType:
    try:
        import reasoning_gym  # 1.4 s, and only tasks need it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "data.source='reasoning_gym/...' needs the package reasoning-gym; pip install reasoning-gym==0.1.25"
        ) from error
    return reasoning_gym


def _problems(gym: ModuleType, task: str, options: Options, *, size: int, seed: int) -> "ProceduralDataset":
    if task not in gym.factory.DATASETS:
        raise ValueError(
            f"data.source='reasoning_gym/{task}' names no task; there are {', '.join(sorted(gym.factory.DATASETS))}"
        )
    try:
        return gym.create_dataset(task, size=size, seed=seed, **options)
    except (AssertionError, TypeError, ValueError) as error:  # its configurations validate themselves with assert
        raise ValueError(
            f"task {task!r} refuses data.task_options={dict(options)}: {error}; its options are those of "
            f"{gym.factory.DATASETS[task][1].__name__} in reasoning_gym"
        ) from error


def _check_scorer(gym: ModuleType, task: str, answer: str) -> None:
    """A few tasks compare tuples, which JSON turns into lists: their scorer would call every answer wrong."""
    problem = json.loads(answer)
    score = gym.get_score_answer_fn(task)(answer=problem["answer"], entry=problem)
    if score < 1:
        raise ValueError(
            f"the scorer of task {task!r} gives its own answer {score:g} instead of 1 once the problem has been "
            "through JSON; choose another task"
        )
