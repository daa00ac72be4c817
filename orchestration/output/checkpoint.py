"""The result of a run: an ordinary Hugging Face checkpoint folder that transformers and vLLM load."""

import errno
import json
import logging
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from actors.weights.manifest import WeightManifest, verified_tensors

logger = logging.getLogger(__name__)

COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "bpe.codes",
    "normalizer.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files of a model besides config.json and its weights: what it stops at, its tokenizer and its chat template."""


def save_checkpoint(folder: Path, *, manifest: WeightManifest, buffers: list[np.ndarray], base_model: str) -> Path:
    """Write published weights with the base model's configuration and tokenizer; the folder appears only when complete.

    Raises: OSError if the folder cannot be written. The weights are then in a rescue folder that the message names.
    """
    try:
        return _write_aside(folder, manifest, buffers, base_model)
    except OSError as error:
        rescue = Path(tempfile.mkdtemp(prefix="async-ebft-rescue-")) / folder.name
        _write_aside(rescue, manifest, buffers, base_model)
        raise OSError(
            error.errno,
            f"cannot write the checkpoint: {error.strerror or error}; version {manifest.policy_version} was saved to "
            f"{rescue} instead. Free space or change logging.output_dir; the intended folder was",
            str(folder),
        ) from error


def _write_aside(folder: Path, manifest: WeightManifest, buffers: list[np.ndarray], base_model: str) -> Path:
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _save_tensors(dict(verified_tensors(manifest, buffers)), aside)  # first: what a disk fills up on
        _copy_companions(_folder_of(base_model), aside, dtype=manifest.dtypes[0])
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # gone already if all went well
    logger.info("checkpoint of version %d: %s", manifest.policy_version, folder)
    return folder


def _folder_of(base_model: str) -> Path:
    """The model itself if it is a folder, else the hub's cache, which holds it since the run loaded it."""
    if Path(base_model).is_dir():
        return Path(base_model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(base_model, allow_patterns=["config.json", *COMPANIONS]))


def _copy_companions(base: Path, folder: Path, *, dtype: str) -> None:
    """Everything by which a model scores, stops and tokenises beside its weights, byte for byte as its base has it.

    Read and written again, it would lose what this version of transformers does not know.
    """
    for path in sorted({path for pattern in COMPANIONS for path in base.glob(pattern) if path.is_file()}):
        target = folder / path.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    text = (base / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    if (saved := config.pop("torch_dtype", None) or config.get("dtype")) != dtype or "dtype" not in config:
        logger.info("the checkpoint is in %s, its base in %s", dtype, saved)
        text = json.dumps(config | {"dtype": dtype}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _save_tensors(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    try:
        save_torch_state_dict(tensors, folder)
    except SafetensorError as error:  # it does not report a full disk as an OSError
        raise OSError(errno.EIO, str(error)) from error
