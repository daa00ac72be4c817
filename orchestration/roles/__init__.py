"""The processes as the loops see them, and how weights travel between them.

Knows cluster and buffer; nothing of the loops.
"""
