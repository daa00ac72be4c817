"""The loops in virtual time between roles that only sleep.

Runs the real controller and buffer; knows neither Ray nor a model.
"""
