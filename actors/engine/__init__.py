"""The vLLM engine: which thread steps it, what it is asked, and how new weights get into it.

Floors, top to bottom: sampler; engine_loop; engine_lock; weight_load; request_batch. `engine_outputs` reads what vLLM
returns; `worker_extension` is what vLLM loads by name into its own processes.
"""
