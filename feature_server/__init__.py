"""Turns rollouts into what rewards are made of: Gram statistics of frozen features, or a verifier's verdict.

Floors, top to bottom: features and verifiers, which do not know each other; packed_forward, forward_check,
scored_rollout; packing; config. A scored rollout carries Gram statistics, so it knows features.gram. Imports actors.
"""
