"""The loops in virtual time between roles that only sleep.

Floors, top to bottom: cluster_sizes, fault_costs, simulate_config; simulator, measured_times; simulated_run; pipeline,
simulated_roles, virtual_time; faults; stage_times, table. Runs the real controller, weight_sync and buffer; imports
neither Ray nor torch.
"""
