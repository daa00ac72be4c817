"""Who runs where, in which order, and what is measured. Imports everything below; nobody imports it.

Floors, top down: the commands; session, simulator; scaling; controller; evaluation; roles; buffer, cluster; output;
idle_time, join_timeline, command_line; config; start_up. pyproject.toml holds them as contracts, and two exceptions.
"""
