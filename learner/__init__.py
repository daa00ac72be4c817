"""Turns scored rollouts into new weights.

A step goes one way: batch, policy (forward), credit (which computes the rewards), loss, engine; the worker drives it.
Floors, top to bottom: worker; publish, step_metrics, training_state; engine, credit; policy; rewards; batch; loss,
logprobs, objective, optimizer_state, config. Knows feature_server and actors.
"""
