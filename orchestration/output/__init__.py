"""What a run shows and leaves behind: metrics, progress, report, checkpoint.

Metrics stand at the bottom, where every loop writes them; `report` alone knows evaluation, whose results it prints.
"""
