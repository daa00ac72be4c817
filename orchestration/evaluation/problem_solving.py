"""Lets a checkpoint solve programming problems, and runs its solutions against their tests in the sandbox."""

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.data.texts import Pair
from actors.data.tokenization import bos_ids, tokenise_pairs
from actors.engine.sampler import Sampler
from feature_server.verifiers.sandbox import program_sandbox
from feature_server.verifiers.server import continued_text
from orchestration.evaluation.evaluate_config import EvaluateConfig
from orchestration.evaluation.measures import Measure, Verdicts, accuracy_measures
from orchestration.evaluation.problems import Problem, program_and_tests, read_problems

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptedProblem:
    """A problem and the tokens of its prompt that a model is given."""

    problem: Problem
    prompt_ids: list[int]


def prompted_problems(config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase) -> list[PromptedProblem]:
    """The problems with their prompts cut as those of pairs: before white space and between two tokens."""
    if config.problems is None:
        return []
    problems = read_problems(Path(config.problems).expanduser())
    pairs = [Pair(name=p.task_id, prompt=p.prompt, completion=p.canonical_solution) for p in problems]
    tokenised = tokenise_pairs(pairs, tokenizer=tokenizer, opening=bos_ids(tokenizer, config.data.bos))
    return [
        PromptedProblem(problem=problem, prompt_ids=pair.token_ids[: pair.num_prompt_tokens].tolist())
        for problem, pair in zip(problems, tokenised, strict=True)
    ]


def solved_problems(
    problems: Sequence[PromptedProblem], sampler: Sampler, config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Measure]:
    """Accuracy and pass@k by the problems' own tests."""
    logger.info("solving %d problems 1 + %d times", len(problems), config.samples_per_problem)
    prompts = [problem.prompt_ids for problem in problems]
    limits = {"max_tokens": config.problem_tokens, "seed": config.seed}
    greedy = sampler.complete(prompts, **limits)
    sampled = sampler.complete(prompts, n=config.samples_per_problem, temperature=config.rollout.temperature, **limits)
    programs = [
        [_program(problem, ids, tokenizer) for ids in (*one, *many)]
        for problem, one, many in zip(problems, greedy, sampled, strict=True)
    ]
    passed = _passed({program for of_problem in programs for program in of_problem}, config)
    verdicts = {
        p.problem.task_id: Verdicts(greedy=first in passed, sampled=[program in passed for program in rest])
        for p, (first, *rest) in zip(problems, programs, strict=True)
    }
    return accuracy_measures("problems", verdicts, pass_at=config.pass_at, clusters={name: name for name in verdicts})


def _program(
    prompted: PromptedProblem, completion_ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    ids = np.array(completion_ids, dtype=np.int64)
    prompt, completion = continued_text(np.array(prompted.prompt_ids, dtype=np.int64), ids, tokenizer)
    return program_and_tests(prompted.problem, prompt=prompt, completion=completion)


def _passed(programs: Iterable[tuple[str, str]], config: EvaluateConfig) -> set[tuple[str, str]]:
    """The programs, with their tests, that pass; each is run once."""
    limits, sandbox = config.verifier, program_sandbox()

    def passes(program: tuple[str, str]) -> bool:
        return sandbox.run(*program, timeout_s=limits.timeout_s, memory_mib=limits.memory_mib).status == "passed"

    unique = sorted(programs)
    with ThreadPoolExecutor(limits.processes) as threads:
        return {program for program, passed in zip(unique, threads.map(passes, unique), strict=True) if passed}
