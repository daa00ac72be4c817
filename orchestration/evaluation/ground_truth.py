"""Whether the ground truth earns the reward that it defines: a verifier that rejects it rewards the wrong thing."""

import logging
from collections.abc import Sequence

from actors.data.documents import evenly_spaced
from actors.rollout import Document

logger = logging.getLogger(__name__)

CHECKED_DOCUMENTS = 8
"""Enough to notice a column or a verifier that does not fit the data."""


def checked_documents(documents: Sequence[Document]) -> list[Document]:
    """Those whose ground truth is verified before anything is sampled."""
    return evenly_spaced(documents, min(CHECKED_DOCUMENTS, len(documents)))


def warn_of_unearned(lines: Sequence[str], *, num_checked: int, verifier: str) -> None:
    """`lines`: of `VerifierServer.unearned`, one for each document that failed."""
    if lines:
        logger.warning(
            "the ground truth of %d of %d documents earns less than 1 from verifier.name=%r, so its rewards may not be "
            "what the data means (a function of your own may count otherwise); check the columns, the verifier and its "
            "limits:\n%s",
            len(lines),
            num_checked,
            verifier,
            "\n".join(lines),
        )
