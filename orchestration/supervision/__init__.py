"""Who is at work: processes that join, leave and fail while a run goes on, and what is done about it.

Knows the controller and the processes; the session starts it.
"""
