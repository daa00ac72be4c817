"""The state of a run on disk: folders that are whole or not there, and files of our messages.

Floors: store, codec. Knows neither Ray nor the loops, nor what it stores.
"""
