"""Turns rollouts into what rewards are made of: Gram statistics of frozen features, or a verifier's verdict.

The two rooms, features and verifiers, do not know each other; both stand on packing, scored_rollout and config.
"""
