"""Turns documents into completions, each token stamped with the policy version that sampled it.

Floors, top to bottom: worker; engine; weights, models, data; rollout and config. Imports none of the other folders.
"""
