"""From the name of a model in the configuration to something that transformers and vLLM load alike.

A folder this module returns is complete: it holds a configuration, weights and a tokenizer. Code that comes
with a model is never run (trust_remote_code stays off). Folders are those of the machine that asks: a model
converted on first use is converted once on every machine, unless ASYNC_EBFT_CACHE names a folder that the
machines share.
"""

import logging
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from actors.models import smollm2

logger = logging.getLogger(__name__)

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).resolve().parent / "embedded_model"
SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_FOLDER = f"{SMOLLM2}-v1"  # counts up whenever actors/models/smollm2.py would write something else
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def resolve_model(name: str, *, cache_dir: Path | None = None) -> str:
    """The absolute folder that `name` stands for, or `name` itself if it is a model of the Hugging Face hub.

    `embedded` is the folder in this package; `smollm2-135m-instruct` is converted on first use into
    `cache_dir` (default: $ASYNC_EBFT_CACHE, else ~/.cache/async-ebft) and re-used from then on. A name that
    starts with a dot, a slash or a tilde, or that exists as a folder, is a local checkpoint. All else is a
    hub name, of which only the configuration is read here.

    Raises: FileNotFoundError if a folder lacks a file that loading it needs; ModuleNotFoundError if the
    conversion lacks a package; ValueError if the hub (or its local cache) cannot answer for the name. Each
    names the remedy.
    """
    if name == EMBEDDED:
        return checked_folder(EMBEDDED_FOLDER, "restore it with git, or retrain it with train.py there")
    if name == SMOLLM2:
        target = (cache_dir or default_cache_dir()).absolute() / SMOLLM2_FOLDER
        make_folder(target, smollm2.convert)
        return checked_folder(target, "delete this folder, and the next run converts the model again")
    if name.startswith((".", "/", "~")) or Path(name).is_dir():
        return checked_folder(Path(name).expanduser(), "give the folder that save_pretrained wrote")
    return _checked_hub_name(name)


def portable_name(name: str) -> str:
    """The name as processes elsewhere should be given it: built-in names resolve anywhere, folders absolutely."""
    return name if name in (EMBEDDED, SMOLLM2) else resolve_model(name)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a resolved model.

    Raises: ValueError if the model comes with none; OSError if its files cannot be read or downloaded.
    """
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    if tokenizer is None:
        raise ValueError(f"transformers knows no tokenizer for the model {model!r}; save one with the model")
    return tokenizer


def num_token_ids(model: str) -> int:
    """One more than the largest token id of the resolved model's tokenizer.

    A network may have rows beyond it, which pad its matrices. Such an id is no token: it is never sampled, and engine
    and learner take their log-probs over the ids before it alone.
    """
    return 1 + max(load_tokenizer(model).get_vocab().values())


def differing_tokens(policy: str, feature_model: str) -> list[str]:
    """The tokens, sorted, that have not the same id in both resolved models' vocabularies; none: ids mean the same."""
    first, second = (load_tokenizer(model).get_vocab() for model in (policy, feature_model))
    return sorted({token for token, _ in first.items() ^ second.items()})


def require_same_tokenizer(policy: str, feature_model: str) -> None:
    """Both resolved models must give every token the same id: the feature model reads the policy's ids.

    Raises: ValueError naming both models and the first difference.
    """
    if different := differing_tokens(policy, feature_model):
        raise ValueError(
            f"model.policy={policy!r} and model.feature_model={feature_model!r} do not share a tokenizer: "
            f"{len(different)} tokens differ, {different[0]!r} for example, and the feature model reads the policy's "
            "token ids; choose one of the policy's family, or set feature.foreign_tokenizer='retokenize'"
        )


def default_cache_dir() -> Path:
    """Where converted models are kept: $ASYNC_EBFT_CACHE, else ~/.cache/async-ebft."""
    return Path(os.environ.get("ASYNC_EBFT_CACHE") or "~/.cache/async-ebft").expanduser()


def make_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a new folder and renames it to `target`, unless `target` exists already.

    A partial `target` is never visible: it appears under its name in one step, and if `write` raises it does
    not appear. Of several concurrent processes the first to finish wins and the others drop their work. A killed
    process may leave a folder whose name starts with a dot; it is never read; delete it.
    """
    if target.is_dir():
        return
    aside = target.parent / f".{target.name}-{uuid.uuid4().hex}"
    aside.mkdir(parents=True)
    try:
        write(aside)
        aside.rename(target)
        logger.info("made %s", target)
    except OSError:
        # A folder cannot be renamed onto a full one: if there is one by now, another process was first.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def checked_folder(folder: Path, remedy: str) -> str:
    """The absolute path of a folder that holds config.json, *.safetensors and a tokenizer.

    Raises: FileNotFoundError that lists what is missing, ending in `remedy`.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder at {folder}; {remedy}")
    needed = {
        "config.json": ["config.json"],
        "weights (*.safetensors)": ["*.safetensors"],
        f"a tokenizer ({' or '.join(TOKENIZER_FILES)})": TOKENIZER_FILES,
    }
    missing = [part for part, globs in needed.items() if not any(any(folder.glob(g)) for g in globs)]
    if missing:
        raise FileNotFoundError(f"the model folder {folder} lacks {', '.join(missing)}; {_not_read(folder)}{remedy}")
    return str(folder)


def _not_read(folder: Path) -> str:
    """About weights of the folder that are there, and not read."""
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    return f"{', '.join(pickled)} is not read, as a pickle can hold code: save it as safetensors; " if pickled else ""


def _checked_hub_name(name: str) -> str:
    try:
        AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the model {name!r} cannot be resolved. Tried: the built-in names ({EMBEDDED}, {SMOLLM2}); the "
            f"folder {Path(name).absolute()}, which does not exist; the Hugging Face hub and its local cache "
            f"(HF_HUB_OFFLINE is {os.environ.get('HF_HUB_OFFLINE') or 'unset'}), which answered: {error}\n"
            "Correct the name, or give a folder. Where the hub cannot be reached, download the model beforehand "
            "and set HF_HUB_OFFLINE=1, which also avoids waiting for it"
        ) from error
    return name
