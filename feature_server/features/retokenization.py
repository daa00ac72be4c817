"""Texts instead of token ids, for a feature model whose tokenizer is not the policy's.

Guarantee: the feature model reads the text that the policy wrote, in its own tokens. Each window is encoded by itself,
so that completions with equal text have equal tokens, and a context never depends on what continues it. A character
whose bytes are divided between context and window belongs to the window as a whole; one that the policy's tokens leave
incomplete at the window's end becomes the replacement character U+FFFD. Every text opens as the feature model's
tokenizer opens it (BOS, for many), whatever opens the policy's. Called by FeatureModel.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.data.tokenization import bos_ids
from actors.rollout import Completions, Document

REPLACEMENT = "\ufffd"
"""What tokenizers decode bytes to that are no whole character."""


def retokenized(
    written: Completions, *, policy_tokenizer: PreTrainedTokenizerBase, feature_tokenizer: PreTrainedTokenizerBase
) -> list[Completions]:
    """Each group by itself, in order: context, ground truth and completions in the feature model's tokens.

    The policy's EOS becomes the feature model's, and a window without text is that EOS. The policy's BOS is left out.
    The feature model's opens the context, and every text behind an EOS; if the context ends with EOS, it holds the one
    that opens the window's text.

    Raises: ValueError if a tokenizer has no EOS, or if the policy's decodes a context differently when it is continued.
    Test: test_retokenization.py::test_features_are_those_of_the_plain_text
    """
    reader = _Reader(policy_tokenizer, feature_tokenizer)
    return [_group(written, group, reader) for group in range(len(written.document.anchors))]


class _Reader:
    """From the policy's tokens to text to the feature model's tokens."""

    def __init__(self, policy: PreTrainedTokenizerBase, feature: PreTrainedTokenizerBase) -> None:
        for tokenizer in (policy, feature):
            if tokenizer.eos_token_id is None:
                raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no EOS token to end a text with; set one")
        self._policy, self._feature = policy, feature
        self._opening = bos_ids(feature, "tokenizer")

    def context(self, ids: Sequence[int]) -> list[int]:
        """The feature model's tokens of a context; bytes at its end that are no whole character are the window's."""
        *texts, last = map(self._decode, self._split(ids))
        encoded = self._encode([*texts, last.rstrip(REPLACEMENT)])
        return self._joined([[*self._opening, *ids] for ids in encoded])

    def window(self, context_ids: Sequence[int], ids: Sequence[int]) -> list[int]:
        """The feature model's tokens of the text by which `ids` prolong the context."""
        tail = self._split(context_ids)[-1]
        known = self._decode(tail).rstrip(REPLACEMENT)
        first, *others = self._split(ids)
        whole = self._decode([*tail, *first])  # together: a token alone may lack its leading space, or half a character
        if not whole.startswith(known):
            raise ValueError(
                f"the policy's tokenizer decodes a context to {known[-40:]!r} when it stands alone and to "
                f"{whole[: len(known)][-40:]!r} when it is continued, so the completion's text cannot be told from it; "
                "use a feature model with the policy's tokenizer"
            )
        own, *following = self._encode([whole[len(known) :], *map(self._decode, others)])
        return self._joined([own, *([*self._opening, *ids] if ids else [] for ids in following)])

    def _split(self, ids: Sequence[int]) -> list[list[int]]:
        """The tokens between one EOS and the next, before the first and after the last, without BOS after EOS."""
        pieces: list[list[int]] = [[]]
        for token in ids:
            if token == self._policy.eos_token_id:
                pieces.append([])
            elif pieces[-1] or len(pieces) == 1 or token != self._policy.bos_token_id:
                pieces[-1].append(token)
        return pieces

    def _decode(self, ids: list[int]) -> str:
        text = self._policy.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # lists are for batches
        return text

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._feature(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def _joined(self, texts: Sequence[list[int]]) -> list[int]:
        """With EOS between them, and EOS for nothing at all."""
        eos = self._feature.eos_token_id
        return [token for ids in texts for token in (*ids, eos)][:-1] or [eos]


def _group(written: Completions, group: int, reader: _Reader) -> Completions:
    document = written.document
    place = np.arange(document.context_starts[group], document.anchors[group])
    context_ids = document.token_ids[np.setdiff1d(place, document.bos_positions)].tolist()
    context = reader.context(context_ids)
    ground_truth = reader.window(context_ids, document.ground_truth_ids(group).tolist())
    completions = [
        reader.window(context_ids, ids[:length].tolist())
        for ids, length in zip(written.completion_ids[group], written.completion_lengths[group], strict=True)
    ]
    horizon = max(map(len, [ground_truth, *completions]))
    padded = [[*ids, *[0] * (horizon - len(ids))] for ids in completions]
    return Completions(
        document=Document(
            document_id=document.document_id,
            token_ids=np.array(context + ground_truth, dtype=np.int64),
            anchors=np.array([len(context)], dtype=np.int64),
            horizon=horizon,
            ends_with_eos=document.ends_with_eos,
        ),
        completion_ids=np.array([padded], dtype=np.int64),
        completion_lengths=np.array([[len(ids) for ids in completions]], dtype=np.int64),
    )
