"""Pooled whitening at the start: one second moment, estimated once, the same on every feature server."""

import asyncio
from collections.abc import Sequence

from torch import Tensor

from actors.data.documents import evenly_spaced
from actors.rollout import Document, Ticket
from orchestration.config import RunConfig
from orchestration.roles.roles import FeatureRole, RolloutRole

WHITENING_SEED = 2**61
"""First seed of the completions that whitening is fitted to: neither training nor evaluation uses these."""


class WhiteningFit:
    """Estimates the moment with one server and passes it to the others, those that join later too."""

    def __init__(self, config: RunConfig) -> None:
        pooled = config.learner.objective == "ebft" and config.learner.whitening == "pooled"
        self._config = config
        self._needed = pooled and config.feature.pooled_moment != "document"
        self.moment: Tensor | None = None
        """The estimate, [feature, feature]; None before it, or if the run needs none. May be set to that of a run that
        is continued."""

    async def fit(self, documents: Sequence[Document], worker: RolloutRole, servers: Sequence[FeatureRole]) -> None:
        """From the initial model's completions of some training documents, if the run whitens by such a moment.

        The worker holds version 0, and nothing else is asked of it meanwhile.
        """
        if not self._needed:
            return
        if self.moment is not None:
            await asyncio.gather(*[self.pass_on(server) for server in servers])
            return
        chosen = evenly_spaced(documents, min(self._config.feature.whitening_documents, len(documents)))
        tickets = [
            Ticket(
                ticket_id=index,
                document=document,
                seed=WHITENING_SEED + index,
                completions_per_context=self._config.rollout.completions_per_context,
                min_policy_version=0,
            )
            for index, document in enumerate(chosen)
        ]
        sampled = await worker.sample(tickets)
        self.moment = await servers[0].fit_whitening([reference for _, reference in sampled])
        await asyncio.gather(*[self.pass_on(server) for server in servers[1:]])

    async def pass_on(self, server: FeatureRole) -> None:
        """Bring a server to the state of the one that estimated the moment."""
        if self.moment is not None:
            await server.set_whitening(self.moment)
