"""Admission, order, lag and reuse of rollouts, live or out of a recorded log.

Knows neither Ray nor the roles: the same code runs in virtual time.
"""
