"""What runs where, in which order, and what is measured. Imports everything below and is imported by none of it.

Floors, top to bottom: the commands; session, simulator; parts; scaling; controller; evaluation; roles; buffer, cluster;
output; checkpoint, idle_time, loops, command_line; config; asynchrony_config, start_up.
"""
