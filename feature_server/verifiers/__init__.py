"""Numbers for whole completions from their text; code that a model wrote runs in a sandbox.

Floors, top to bottom: server; verifiers; function_process, reasoning_gym_scorer; sandbox; fork_server, program_roles;
confinement, border; file_rules, syscall_filter, plain_values. What the sandbox's processes import, it names by path.
"""
