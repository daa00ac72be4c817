"""What a run shows and leaves behind: metrics, progress, report, checkpoint.

Knows evaluation's results; nothing of the loops.
"""
