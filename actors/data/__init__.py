"""From a source of texts to tokenised documents with their anchors.

Knows config and rollout; nothing of engines or weights.
"""
