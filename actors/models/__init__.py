"""From a model's name to a folder that transformers and vLLM load; the embedded default model.

Knows nothing else of this project.
"""
