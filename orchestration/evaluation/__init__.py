"""What is measured on held-out documents, during a run and of a checkpoint, with its uncertainty.

Knows roles; nothing of the loops.
"""
