"""The state of a run on disk: folders that are whole or not there.

Knows neither Ray nor the loops, nor what it stores.
"""
