"""What a run shows and writes: metrics, progress, report, checkpoint.

Metrics stand at the bottom, where every loop writes them; `report` alone knows evaluation, whose results it prints.
"""
