"""Evaluate a checkpoint: `python orchestration/evaluate.py CHECKPOINT [config.toml] [--section.key value ...]`.

CHECKPOINT is the checkpoint folder of a run, any other model folder, `embedded`, or a name on the hub.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # as in run.py: orchestration/ itself must not hide the standard library

import logging  # noqa: E402
import os  # noqa: E402

from rich.console import Console  # noqa: E402

from orchestration.evaluation.evaluate_config import EvaluateConfig, parse_evaluation  # noqa: E402
from orchestration.evaluation.measures import as_json, as_table  # noqa: E402
from orchestration.output.strict_json import strict_json  # noqa: E402
from orchestration.start_up import refuse, start_command  # noqa: E402

logger = logging.getLogger(__name__)


def main() -> int:
    """Exit status: 0 done, 1 failed while evaluating, 2 refused before anything started."""
    start_command(sys.argv[1:])
    try:
        checkpoint, config = parse_evaluation(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        return refuse(error)
    for library in ("vllm", "py.warnings"):  # what vLLM logs while it is imported
        logging.getLogger(library).setLevel(logging.ERROR)
    _set_environment(config)
    from orchestration.evaluation.checkpoint_evaluation import evaluate_checkpoint  # imports torch

    try:
        measures = evaluate_checkpoint(checkpoint, config)
    except (ValueError, RuntimeError, OSError, ModuleNotFoundError) as error:
        logger.error("the evaluation failed: %s", error, exc_info=logger.isEnabledFor(logging.DEBUG))
        return 1
    # A file has no width: without one, rich would wrap the names at 80 columns.
    Console(width=None if sys.stdout.isatty() else 120).print(as_table(measures, checkpoint=checkpoint))
    if config.output is not None:
        result = as_json(measures, checkpoint=checkpoint, config=config)
        Path(config.output).expanduser().write_text(strict_json(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _set_environment(config: EvaluateConfig) -> None:
    """The environment variables of a run's processes; torch and vLLM read them when they are imported."""
    os.environ |= {
        "OMP_NUM_THREADS": str(config.threads),
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
    }
    from actors.engine.sampler import CPU_ENGINE_ENVIRONMENT, ENGINE_ENVIRONMENT  # imports torch

    os.environ |= ENGINE_ENVIRONMENT
    if config.device == "cpu":
        os.environ |= CPU_ENGINE_ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}


if __name__ == "__main__":
    sys.exit(main())
