"""The result of a run: an ordinary Hugging Face checkpoint folder that transformers and vLLM load."""

import errno
import logging
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from actors.models.pretrained import load_tokenizer
from actors.weights.manifest import WeightManifest, verified_tensors

logger = logging.getLogger(__name__)


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
    from transformers import AutoConfig

    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _save_tensors(dict(verified_tensors(manifest, buffers)), aside)  # first: what a disk fills up on
        config = AutoConfig.from_pretrained(base_model)
        config.dtype = getattr(torch, manifest.dtypes[0])
        config.save_pretrained(aside)
        load_tokenizer(base_model).save_pretrained(aside)
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # gone already if all went well
    logger.info("checkpoint of version %d: %s", manifest.policy_version, folder)
    return folder


def _save_tensors(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    try:
        save_torch_state_dict(tensors, folder)
    except SafetensorError as error:  # it does not report a full disk as an OSError
        raise OSError(errno.EIO, str(error)) from error
