"""A policy so small that every group of completions it could draw can be summed over."""

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from feature_server.features.gram import gram_statistics
from learner.objective.importance import (
    SampledTokens,
)

VOCABULARY = 3
LENGTH_1 = tuple((v,) for v in range(VOCABULARY))
LENGTH_2 = tuple(itertools.product(range(VOCABULARY), repeat=2))
ENDED_BY_0 = tuple(c for c in (*LENGTH_1, *LENGTH_2) if (c[0] == 0) == (len(c) == 1))  # token 0 ends a completion


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LEARNER = random(1 + VOCABULARY, VOCABULARY, seed=1)
"""Logits after each prefix: row 0 after none, row 1 + v after token v."""
BEHAVIOR = LEARNER + random(1 + VOCABULARY, VOCABULARY, seed=6)


@dataclass(frozen=True, kw_only=True)
class Toy:
    """All completions, their features, the ground truth's, and all groups of n."""

    completions: tuple[tuple[int, ...], ...]
    n: int

    @cached_property
    def features(self) -> Tensor:
        return random(len(self.completions), 4, seed=3)

    @cached_property
    def ground_truth(self) -> Tensor:
        return random(4, seed=4)

    @cached_property
    def groups(self) -> Tensor:
        """Indices of the completions of every ordered group."""
        return torch.tensor(list(itertools.product(range(len(self.completions)), repeat=self.n)))

    @cached_property
    def prefixes_and_tokens(self) -> tuple[Tensor, Tensor]:
        """Row of logits and token, for each token of each completion of each group in turn."""
        drawn = [self.completions[index] for index in self.groups.flatten().tolist()]
        rows = [row for tokens in drawn for row in (0, *(1 + v for v in tokens[:-1]))]
        return torch.tensor(rows), torch.tensor([v for tokens in drawn for v in tokens])

    @cached_property
    def owner(self) -> Tensor:
        """The drawn completion of each token, counted through all groups."""
        lengths = torch.tensor([len(tokens) for tokens in self.completions])[self.groups.flatten()]
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    def logprobs(self, theta: Tensor) -> Tensor:
        """Of every drawn token."""
        return theta.log_softmax(-1)[self.prefixes_and_tokens]

    def sampled(self, learner: Tensor, behavior: Tensor) -> SampledTokens:
        """Every group, as if each had been drawn once."""
        return SampledTokens(
            learner_logprobs=self.logprobs(learner),
            behavior_logprobs=self.logprobs(behavior),
            completion=self.owner,
            num_completions=self.groups.numel(),
            lag=torch.full((len(self.owner),), 3.0),
        )

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Alignments and inner products of every group, unwhitened."""
        gram = gram_statistics(self.features[self.groups], self.ground_truth.expand(len(self.groups), -1))
        return gram.ground_truth_products, gram.gram

    def expected(self, factor: Tensor, advantages: Tensor, *, learner: Tensor, behavior: Tensor) -> Tensor:
        """E[(1/n) sum of factor * advantage * grad log p(token)] over groups that the behavior policy draws."""
        rows, tokens = self.prefixes_and_tokens
        total = torch.zeros(self.groups.numel(), dtype=torch.float64).index_add(0, self.owner, self.logprobs(behavior))
        probability = total.reshape(self.groups.shape).sum(-1).exp()
        assert abs(float(probability.sum()) - 1) < 1e-12
        score = torch.eye(VOCABULARY, dtype=torch.float64)[tokens] - learner.softmax(-1)[rows]
        each = (probability.unsqueeze(-1) * advantages / self.n).flatten()[self.owner] * factor
        return torch.zeros_like(learner).index_add(0, rows, each.unsqueeze(-1) * score)

    def mean_feature(self, theta: Tensor) -> Tensor:
        """Mean feature of the completions that the policy draws; differentiable."""
        table = theta.log_softmax(-1)
        logprobs = [
            table[0, tokens[0]] + sum(table[1 + a, b] for a, b in itertools.pairwise(tokens))
            for tokens in self.completions
        ]
        return torch.stack(logprobs).exp() @ self.features

    def descent(self, theta: Tensor, *, diversity_coef: float = 1.0) -> Tensor:
        """-grad of diversity_coef ||mean||^2 - 2 <mean, phi_y>, by autograd; with 1 that is -grad L_CFM."""
        theta = theta.clone().requires_grad_()
        mean = self.mean_feature(theta)
        (2 * mean @ self.ground_truth - diversity_coef * mean.square().sum()).backward()
        return theta.grad


def relative_error(estimate: Tensor, target: Tensor) -> float:
    return float((estimate - target).norm() / target.norm())
