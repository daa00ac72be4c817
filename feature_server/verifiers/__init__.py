"""Numbers for whole completions from their text; code that a model wrote runs in a sandbox.

Floors, top to bottom: server; verifiers; function_process, sandbox and what confines them.
"""
