"""The loops in virtual time between roles that only sleep.

Floors, top to bottom: cluster_sizes, simulate_config; simulator, measured_times; simulated_roles, virtual_time;
stage_times. Runs the real controller, weight_sync and buffer; imports neither Ray nor torch.
"""
