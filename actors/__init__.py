"""Turns documents into completions, each token stamped with the policy version that sampled it.

Floors, top to bottom: worker; engine; data, models, weights, which do not know each other; config; rollout.
Imports none of the other folders; config checks its spans with data.blocks.
"""
