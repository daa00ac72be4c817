"""Admission, order, lag and reuse of rollouts, live or from a recorded log.

Knows neither Ray nor the roles: the same code runs in virtual time.
"""
