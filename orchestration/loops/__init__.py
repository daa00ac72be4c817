"""The loops of a run, and who takes part in them.

Knows buffer and roles by their interfaces; nothing of Ray or of tensors.
"""
