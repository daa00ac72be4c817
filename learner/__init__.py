"""Turns scored rollouts into new weights.

Floors, top to bottom: worker; publish, engine; credit, policy; batch, loss; objective. Knows feature_server and actors.
"""
