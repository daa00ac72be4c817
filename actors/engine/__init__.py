"""The vLLM engine: who steps it, what it is asked, and how new weights come into it.

Knows weights; `worker_extension` is what vLLM loads by name into its own processes.
"""
