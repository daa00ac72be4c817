"""What a run imports on its way: the fork server of `warm_process` imports it once for all runs."""

import importlib

MODULES = (
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
    "actors.worker",
    "feature_server.features.server",
    "learner.worker",
    "orchestration.session",
)
for module in MODULES:
    importlib.import_module(module)
