"""Turns scored rollouts into new weights.

A step goes one way: batch, policy (forward), rewards, credit, loss, engine, step_metrics; the worker drives it.
Floors, top to bottom: worker; publish, engine, step_metrics; credit, policy; rewards; batch, loss; objective. Knows
feature_server and actors.
"""
