"""Makes the bundled GPU profiles from published step measurements.

    python -m batchpilot.env.calibrate.from_measurements FOLDER            print every profile
    python -m batchpilot.env.calibrate.from_measurements FOLDER NAME ...   these
    python -m batchpilot.env.calibrate.from_measurements FOLDER --check    compare with the bundled
    python -m batchpilot.env.calibrate.from_measurements FOLDER --write    replace the bundled

FOLDER holds two CSV files, one row per step, with at least the columns `gpu`, `model`, `tp`,
`decode_seqs`, `prefill_tokens`, `kv_tokens` (context lengths of the decoding sequences, summed) and
`step_ms`:

    aic_composed_steps.csv            ai-dynamo/aiconfigurator's kernel tables (Apache-2.0), for
                                      vLLM and bf16: matrix products, attention and all-reduce of a
                                      step added up. Decode and prompt attention were measured
                                      apart, so what mixing them costs is unknown.
    llmservingsim_composed_steps.csv  casys-kaist/LLMServingSim's layer profiles (MIT), added up;
                                      mixed attention is measured. Its further column
                                      `prefill_prior_ctx_tokens` is the context before a prompt's
                                      chunk: rows with any are left out, the form has no term for
                                      them, and so are rows of more KV tokens than the GPU holds.

What a step's time is fitted with is `batchpilot.env.calibrate.fit`; what is not in the step files
(KV blocks, overhead, model limits) is in `RECIPES` below, each with its source. The same files give
the same profiles to the last digit.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from batchpilot.agents.parameters import ConfigError
from batchpilot.env.calibrate.fit import StepSample, fit_step_times
from batchpilot.env.profiles import GpuProfile, load_profile, profile_to_text

BUNDLED = Path(__file__).parent.parent / "gpu_profiles"
AIC_FILE, LSS_FILE = "aic_composed_steps.csv", "llmservingsim_composed_steps.csv"
COLUMNS = ("gpu", "model", "tp", "decode_seqs", "prefill_tokens", "kv_tokens", "step_ms")

_AIC = (
    "step_time: fitted with batchpilot.env.calibrate.fit to {steps} steps composed from the kernel "
    "tables of ai-dynamo/aiconfigurator (vLLM, bf16: matrix products, attention{all_reduce}; "
    "norms, sampler and CPU time are not in them); decode and prompt attention were measured "
    "apart, so what mixing costs is unknown."
)
_LSS = (
    "step_time: fitted with batchpilot.env.calibrate.fit to {steps} steps that "
    "casys-kaist/LLMServingSim's profiler measured layer by layer (vLLM 0.19 kernels, sampler "
    "included, mixed attention measured; prompts without prior context, KV tokens up to this "
    "profile's capacity)."
)
_ELSEWHERE = (
    "not measured here; taken from Llama-3.1-8B on an H100 behind vLLM's HTTP server (about 0.04 "
    "ms per sequence), lower without HTTP"
)
_LEADERBOARD = (
    "estimated from the gap between this fit and real inter-token latencies of Llama-3.1-8B on one "
    "H100 behind vLLM's HTTP server (ml.energy leaderboard): about 0.4 ms at 8 sequences, 6 ms at "
    "128, 19 ms at 512; lower without HTTP"
)
_REPLAYED = (
    "about {ms} ms a step at {seqs} sequences, found by replaying a real run of vLLM 0.19 in "
    "process"
)
_ESTIMATED = (
    "estimated: 0.9 of {gib} GiB a GPU, less 2 bytes a parameter and 1.2 GiB for activations and "
    "buffers, as measured engines with such models need"
)


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name in a profile, in the step files, and the memory that vLLM sees."""

    full: str
    in_steps: str
    visible_gib: str = ""


@dataclass(frozen=True)
class Model:
    """A model: its name in a profile and in the step files, and what its configuration says."""

    full: str
    in_steps: str
    kv_bytes_per_token: int
    max_model_len: int


A100 = Gpu("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB", "79.15")
H100 = Gpu("NVIDIA H100-SXM-80GB", "H100-SXM-80GB", "79.11")
H200 = Gpu("NVIDIA H200-SXM-141GB", "H200-SXM-141GB", "139.8")
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", "RTX4090")
RTX_PRO_6000 = Gpu("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTXPRO6000")
LLAMA_8B = Model("meta-llama/Llama-3.1-8B-Instruct", "Llama-3.1-8B", 131_072, 131_072)
LLAMA_8B_BASE = replace(LLAMA_8B, full="meta-llama/Llama-3.1-8B")
LLAMA_70B = Model("meta-llama/Llama-3.1-70B-Instruct", "Llama-3.1-70B", 327_680, 131_072)
QWEN_8B = Model("Qwen/Qwen3-8B", "Qwen3-8B", 147_456, 40_960)


@dataclass(frozen=True)
class Recipe:
    """How one profile is made.

    Attributes:
        name: The profile's.
        model: The model.
        gpu: The GPU.
        num_blocks: KV blocks of 16 tokens.
        blocks_source: Where that number is from; None: estimated from the GPU's memory.
        overhead_decode_seq_ms: The engine's own time per decoding sequence.
        overhead_source: Where that number is from.
        tensor_parallel: GPUs that share the model.
        max_model_len: None takes the model's.
        layers: Measured layer by layer (LLMServingSim) and not from kernel tables.
    """

    name: str
    model: Model
    gpu: Gpu
    num_blocks: int
    blocks_source: str | None = None
    overhead_decode_seq_ms: float = 0.04
    overhead_source: str = _ELSEWHERE
    tensor_parallel: int = 1
    max_model_len: int | None = None
    layers: bool = False

    @property
    def steps_file(self) -> str:
        """The file its steps are in."""
        return LSS_FILE if self.layers else AIC_FILE

    def uses(self, row: dict[str, str]) -> bool:
        """Whether a row of that file is one of its steps."""
        key = (self.gpu.in_steps, self.model.in_steps, str(self.tensor_parallel))
        if (row["gpu"], row["model"], row["tp"]) != key:
            return False
        if not self.layers:
            return True
        fits = int(row["kv_tokens"]) <= (self.num_blocks - 1) * BLOCK_SIZE
        return fits and row["prefill_prior_ctx_tokens"] == "0"

    def source(self, steps: int) -> str:
        """Where each number is from, in words."""
        all_reduce = ", all-reduce" if self.tensor_parallel > 1 else ""
        fitted = (_LSS if self.layers else _AIC).format(steps=steps, all_reduce=all_reduce)
        blocks = self.blocks_source or _ESTIMATED.format(gib=self.gpu.visible_gib)
        return (
            f"{fitted} overhead: {self.overhead_source}. num_blocks: {blocks}. noise: not measured."
        )


BLOCK_SIZE = 16
RECIPES = (
    Recipe("llama-3.1-8b-a100", LLAMA_8B, A100, 28_200),
    Recipe("llama-3.1-8b-h100", LLAMA_8B, H100, 28_200, overhead_source=_LEADERBOARD),
    Recipe("llama-3.1-8b-h200", LLAMA_8B, H200, 56_100),
    Recipe(
        "llama-3.1-8b-rtx4090",
        LLAMA_8B_BASE,
        RTX_4090,
        2588,
        "measured by vLLM 0.19 at gpu_memory_utilization 0.9 (casys-kaist/LLMServingSim)",
        0.0135,
        _REPLAYED.format(ms="0.5", seqs=37),
        max_model_len=32_768,
        layers=True,
    ),
    Recipe(
        "llama-3.1-8b-rtxpro6000",
        LLAMA_8B_BASE,
        RTX_PRO_6000,
        35_913,
        "measured by vLLM 0.28 at gpu_memory_utilization 0.92 (casys-kaist/LLMServingSim)",
        0.016,
        _REPLAYED.format(ms="1.9", seqs=120),
        layers=True,
    ),
    Recipe("llama-3.1-70b-a100-tp4", LLAMA_70B, A100, 30_500, tensor_parallel=4),
    Recipe(
        "llama-3.1-70b-h100-tp4",
        LLAMA_70B,
        H100,
        30_425,
        "measured by vLLM at max_num_batched_tokens 2048 (inference-sim/inference-sim, experiment "
        "configuration)",
        tensor_parallel=4,
    ),
    Recipe("llama-3.1-70b-h200-tp4", LLAMA_70B, H200, 75_200, tensor_parallel=4),
    Recipe("qwen3-8b-a100", QWEN_8B, A100, 24_900),
    Recipe("qwen3-8b-h100", QWEN_8B, H100, 24_900),
    Recipe("qwen3-8b-h200", QWEN_8B, H200, 49_800),
)


def make_profile(recipe: Recipe, folder: Path) -> GpuProfile:
    """Fits a profile to the recipe's steps.

    Raises:
        ConfigError: The file is missing, malformed, or has too few of its steps.
    """
    samples = read_steps(folder / recipe.steps_file, recipe)
    fit = fit_step_times(samples, mixed_attention=recipe.layers)
    return GpuProfile(
        name=recipe.name,
        model=recipe.model.full,
        gpu=recipe.gpu.full,
        tensor_parallel=recipe.tensor_parallel,
        kv_bytes_per_token=recipe.model.kv_bytes_per_token,
        num_blocks=recipe.num_blocks,
        block_size=BLOCK_SIZE,
        max_model_len=recipe.max_model_len or recipe.model.max_model_len,
        step_time=replace(fit.model, overhead_decode_seq_ms=recipe.overhead_decode_seq_ms),
        noise=0.0,
        source=recipe.source(len(samples)),
        licence="MIT" if recipe.layers else "Apache-2.0",
        fit_error=fit.error,
    )


def read_steps(path: Path, recipe: Recipe) -> list[StepSample]:
    """The recipe's steps.

    Raises:
        ConfigError: The file is missing, or a column or number is wrong (naming the line).
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            needed = (*COLUMNS, *(["prefill_prior_ctx_tokens"] if recipe.layers else []))
            missing = [name for name in needed if name not in (rows.fieldnames or ())]
            if missing:
                raise ConfigError(f"{path}: no column {missing[0]!r}")
            return [_sample(path, rows.line_num, row) for row in rows if recipe.uses(row)]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None


def _sample(path: Path, line: int, row: dict[str, str]) -> StepSample:
    try:
        seconds = float(row["step_ms"]) / 1e3
        decode_seqs, prompt = int(row["decode_seqs"]), int(row["prefill_tokens"])
        # The steps taken hold one prompt, from its beginning.
        return StepSample(seconds, decode_seqs, prompt, int(row["kv_tokens"]), prompt * prompt)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}, line {line}: {error}") from None


def chosen(names: Sequence[str]) -> list[Recipe]:
    """The recipes of these names, or all.

    Raises:
        ConfigError: A name that no recipe has.
    """
    known = {recipe.name: recipe for recipe in RECIPES}
    for name in names:
        if name not in known:
            raise ConfigError(f"no recipe makes {name!r}; known: {', '.join(known)}")
    return [known[name] for name in names] if names else list(RECIPES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints, checks or writes; 1 where a bundled profile is another, 2 for what cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the step files are")
    parser.add_argument("names", nargs="*", metavar="NAME", help="profiles; all when left out")
    parser.add_argument("--check", action="store_true", help="compare with the bundled profiles")
    parser.add_argument("--write", action="store_true", help="replace the bundled profiles")
    options = parser.parse_args(arguments)
    differ = False
    try:
        for recipe in chosen(options.names):
            text = profile_to_text(make_profile(recipe, options.folder))
            if options.write:
                (BUNDLED / f"{recipe.name}.json").write_text(text, encoding="utf-8")
            if options.check:
                same = text == profile_to_text(load_profile(recipe.name))
                differ = differ or not same
                print(f"{recipe.name}: {'the same' if same else 'DIFFERS'}")
            if not (options.write or options.check):
                print(text, end="")
    except (ConfigError, OSError) as error:
        print(f"from_measurements: {error}", file=sys.stderr)
        return 2
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
