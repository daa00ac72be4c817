"""Numbers for whole completions from their text; code that a model wrote runs in a sandbox.

Floors, top to bottom: server; verifiers; function_process, sandbox; sandbox_child; syscall_filter. The scorer of
reasoning-gym is loaded like a verifier of the user and knows nothing else of this project.
"""
