"""From a source of texts to tokenised documents with their anchors.

Floors, top to bottom: documents; text_splits, tokenization; text_sources; stdlib_source, task_source; texts, blocks.
Knows config and rollout; nothing of engines, models or weights.
"""
