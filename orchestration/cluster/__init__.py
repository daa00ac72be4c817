"""Processes: how they are placed, started, called and ended. The only room that starts Ray actors.

Knows nothing of the loops.
"""
