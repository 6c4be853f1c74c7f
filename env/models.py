"""Models by name, for every engine that runs one: a real one, a tiny one, or any folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.cache import build_once, cache_folder
from batchpilot.env.smollm2 import smollm2_path

__all__ = [
    "MODEL_NAMES",
    "ModelSource",
    "longest_that_fits",
    "resolve_model",
    "smollm2_path",
    "tiny_model_path",
]

# Small enough for 10,000 tokens/s on two cores, deep enough that every layer kind of vLLM's runs.
TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "vocab_size": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What an engine needs to know to load a model.

    Attributes:
        name: As the user asked for it.
        path: Its folder, with a config.json.
        vocab_size: Token ids run from 0 to this, exclusive.
        max_model_len: Longest prompt and output together, in tokens.
        load_format: vLLM's: "auto" reads the weights, "dummy" makes random ones.
        skip_tokenizer_init: True where the folder has no tokenizer.
    """

    name: str
    path: Path
    vocab_size: int
    max_model_len: int
    load_format: str = "auto"
    skip_tokenizer_init: bool = False


def longest_that_fits(model: ModelSource, kv_blocks: int, block_size: int) -> int:
    """The model's own limit, or what the KV cache holds where that is less: vLLM insists.

    Args:
        model: The model.
        kv_blocks: KV blocks; 0 fills the memory.
        block_size: Tokens per block.

    Raises:
        ConfigError: Too few blocks for any request.
    """
    if not kv_blocks:
        return model.max_model_len
    capacity = (kv_blocks - 1) * block_size  # vLLM keeps one block for itself
    if capacity < 2:
        raise ConfigError(f"kv_blocks={kv_blocks} must be at least 2, or 0 for all memory")
    return min(model.max_model_len, capacity)


def tiny_model_path(cache_dir: Path | None = None) -> Path:
    """A 4-layer Llama without weights, for `load_format="dummy"`: starts and runs fast.

    Args:
        cache_dir: Where model folders are kept; `cache_folder()` by default.

    Raises:
        ConfigError: The folder cannot be written.
    """
    text = json.dumps(TINY_CONFIG, indent=2)
    # A changed configuration gets a folder of its own, so that an old one is never used for it.
    version = hashlib.sha256(text.encode()).hexdigest()[:8]
    target = (cache_dir or cache_folder()) / f"tiny-llama-{version}"

    def write(folder: Path) -> None:
        (folder / "config.json").write_text(text)

    return build_once(target, write, needed_bytes=len(text))


_BUILT_IN: dict[str, Callable[[Path | None], Path]] = {
    "smollm2-135m": smollm2_path,
    "tiny": tiny_model_path,
}
MODEL_NAMES = tuple(_BUILT_IN)


def resolve_model(name: str, *, cache_dir: Path | None = None) -> ModelSource:
    """Finds a model, making it ready first where it is one of ours.

    Args:
        name: One of `MODEL_NAMES`, or a folder with config.json and weights.
        cache_dir: Where our own are kept; `cache_folder()` by default.

    Raises:
        ConfigError: No such model, or its folder cannot be used.
    """
    if name in _BUILT_IN:
        folder = _BUILT_IN[name](cache_dir)
    else:
        folder = Path(name).expanduser()
        _check_model_folder(name, folder)
    numbers = partial(_config_number, _read_config(folder), folder)
    return ModelSource(
        name=name,
        path=folder,
        vocab_size=numbers("vocab_size"),
        max_model_len=numbers("max_position_embeddings"),
        load_format="dummy" if name == "tiny" else "auto",
        skip_tokenizer_init=not any((folder / file).is_file() for file in _TOKENIZER_FILES),
    )


def _check_model_folder(name: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"no model {name!r}; known: {', '.join(MODEL_NAMES)}, or a folder with config.json"
        )
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHT_PATTERNS):
        raise ConfigError(f"model {name!r}: no weights ({' '.join(_WEIGHT_PATTERNS)}) in {folder}")


def _read_config(folder: Path) -> dict[str, Any]:
    """The text model's part of config.json."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no JSON object")
    text_config = config.get("text_config", config)
    return text_config if isinstance(text_config, dict) else config


def _config_number(config: dict[str, Any], folder: Path, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{folder / 'config.json'}: {key}={value!r} is not a positive number")
    return value
