"""The processes as the loops see them, and the way of weights between them.

Knows cluster and buffer; nothing of the loops.
"""
