"""Turns scored rollouts into new weights.

Floors, top to bottom: worker; publish, step_metrics; engine, credit, kept_weights; policy, batch; loss, logprobs,
objective, config. Imports feature_server and actors.
"""
