"""Settings of `orchestration/evaluate.py`: keys of its own, and those of a run that it reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from actors.config import DataConfig, Dtype, SamplingConfig, Settings
from feature_server.config import FeatureMapConfig, VerifierConfig
from orchestration.command_line import parse


class EvaluateConfig(Settings):
    """Evaluation of a checkpoint: cross-entropy, CFM against completion length, accuracy and pass@k, with intervals."""

    seed: int = Field(0, ge=0, lt=2**32)
    """Seeds every completion: equal seeds make the values of two checkpoints comparable document by document."""
    split: Literal["train", "validation", "test"] = "validation"
    """Split whose documents are evaluated; `test` for a final confirmation."""
    documents: int = Field(96, ge=0)
    """How many of them, evenly spaced over the split; 0: none, only `problems`."""
    lengths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Tokens after which completions and ground truth are cut for the CFM, unless they end before; none: no CFM.
    Strided mode takes its horizon from the longest, not from data.horizon."""
    anchors_per_document: int = Field(2, gt=0)
    """Places in a document where completions start (strided mode), evenly spaced; data.stride is not used."""
    verify: bool = False
    """True: `verifier` scores whole completions (completion mode): greedy accuracy and pass@k."""
    pass_at: tuple[int, ...] = (1, 4, 16)
    """The k of pass@k."""
    samples_per_problem: int = Field(16, gt=0)
    """Completions from which pass@k is estimated, at rollout.temperature."""
    problems: str | None = None
    """A .jsonl or .jsonl.gz file of programming problems as HumanEval has them (task_id, prompt, entry_point,
    canonical_solution, test); their tests run in a sandbox with the limits of `verifier`."""
    problem_tokens: int = Field(256, gt=0)
    """Most tokens of a problem's solution."""
    output: str | None = None
    """JSON file for all numbers, including those of each document; None: only the table is shown."""
    feature_model: str = "embedded"
    """The frozen network whose features measure the CFM: name the same base model for every checkpoint."""
    dtype: Dtype = "float32"
    """Precision of the weights in the engine and in the feature model."""
    device: Literal["cpu", "gpu"] = "cpu"
    """What the engine and the feature model run on."""
    threads: int = Field(1, gt=0)
    """Threads of the tensor kernels on CPU; more than the free cores slows everything down."""
    data: DataConfig = DataConfig()
    rollout: SamplingConfig = SamplingConfig()
    feature: FeatureMapConfig = FeatureMapConfig()
    verifier: VerifierConfig = VerifierConfig()

    @property
    def cfm_lengths(self) -> tuple[int, ...]:
        """The lengths that completions can have."""
        horizon = self.data.horizon if self.data.mode == "completion" else max(self.lengths, default=0)
        return tuple(length for length in self.lengths if length <= horizon)

    @field_validator("lengths", "pass_at")
    @classmethod
    def _ascending_from_one(cls, counts: tuple[int, ...]) -> tuple[int, ...]:
        if any(count < 1 for count in counts) or list(counts) != sorted(set(counts)):
            raise ValueError(f"must be ascending whole numbers from 1, such as 1 2 4, got {counts}")
        return counts

    @model_validator(mode="after")
    def _completions_fit(self) -> "EvaluateConfig":
        if not self.lengths:
            return self
        longest, data = self.lengths[-1], self.data
        room = data.document_tokens - data.context_tokens - longest + 1
        if data.mode == "strided" and room < self.anchors_per_document:
            raise ValueError(
                f"data.document_tokens={data.document_tokens} leaves no room for anchors_per_document="
                f"{self.anchors_per_document} after data.context_tokens={data.context_tokens} and before {longest} "
                f"tokens of ground truth (the longest of lengths={self.lengths}); raise it or leave out lengths"
            )
        if self.rollout.completions_per_context < 2:
            raise ValueError(
                f"the unbiased CFM needs rollout.completions_per_context >= 2, got "
                f"{self.rollout.completions_per_context}; raise it, or leave out all lengths"
            )
        return self

    @model_validator(mode="after")
    def _samples_suffice(self) -> "EvaluateConfig":
        if self.pass_at and self.pass_at[-1] > self.samples_per_problem:
            raise ValueError(
                f"pass_at={self.pass_at} needs samples_per_problem >= {self.pass_at[-1]}, got "
                f"{self.samples_per_problem}; raise it, or leave out the larger k"
            )
        return self

    @model_validator(mode="after")
    def _there_is_something_to_verify(self) -> "EvaluateConfig":
        if self.verify and (self.data.mode != "completion" or not self.documents):
            raise ValueError(
                f"verify=True needs data.mode='completion' and documents >= 1 (a verifier scores whole completions), "
                f"got {self.data.mode!r} and {self.documents}; set them, or verify=False"
            )
        if not self.documents and self.problems is None:
            raise ValueError("documents=0 and no problems: there is nothing to evaluate; set one of the two")
        return self


def parse_evaluation(arguments: Sequence[str]) -> tuple[str, EvaluateConfig]:
    """`CHECKPOINT [config.toml] [--section.key value ...]`: the checkpoint's name, and the configuration as for a run.

    Raises: ValueError naming each refused key, its value and the rule, or why the checkpoint or the output is unusable;
    FileNotFoundError if a file that is named is missing.
    """
    arguments = list(arguments)
    wants_help = bool({"-h", "--help"} & set(arguments))
    if not wants_help and (not arguments or arguments[0].startswith("-")):
        raise ValueError("the first argument must be the checkpoint: a folder, 'embedded', or a name on the hub")
    checkpoint = "" if arguments[0].startswith("-") else arguments.pop(0)
    config = parse(EvaluateConfig, arguments, prog="orchestration/evaluate.py CHECKPOINT [config.toml]")
    _check_paths(checkpoint, config)
    return checkpoint, config


def _check_paths(checkpoint: str, config: EvaluateConfig) -> None:
    """Checks that load nothing; `resolve_model` makes the others."""
    if checkpoint.startswith((".", "/", "~")) and not Path(checkpoint).expanduser().is_dir():
        raise FileNotFoundError(f"there is no checkpoint folder {checkpoint!r}; give the checkpoint folder of a run")
    if config.problems is not None and not Path(config.problems).expanduser().is_file():
        raise FileNotFoundError(f"problems={config.problems!r} does not exist; give a .jsonl or .jsonl.gz file")
    if config.output is None:
        return
    output = Path(config.output).expanduser()
    if output.exists() or not output.parent.is_dir():
        raise ValueError(
            f"output={config.output!r} must be a new file in a folder that exists, so that no earlier result is "
            "overwritten; choose another name"
        )
