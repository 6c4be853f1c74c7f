"""The settings of a calibration: every option of its command line, typed and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from batchpilot.agents.parameters import ConfigError, Parameters, parameter
from batchpilot.env.profiles import check_profile_name


@dataclass(frozen=True)
class CalibrateSettings(Parameters):
    """One field per option; `max_num_seqs` is `--max-num-seqs`, and so on.

    Raises:
        ConfigError: A value of the wrong type or out of range.
    """

    model: str = parameter("smollm2-135m", help="smollm2-135m, tiny, or a model folder")
    out: str = parameter("profile.json", help="where the profile goes")
    plot: str | None = parameter(None, help="also draw measured and fitted to this .svg or .png")
    name: str | None = parameter(
        None, help="the profile's name; <model>-<device> in lower case when left out"
    )
    quick: bool = parameter(False, help="a small grid: seconds, and a rough profile")
    max_num_seqs: int = parameter(128, minimum=2, help="largest batch, start-up limit of vLLM")
    max_num_batched_tokens: int = parameter(
        2048, minimum=2, help="start-up limit of tokens per step"
    )
    kv_blocks: int = parameter(0, minimum=0, help="KV blocks; 0 fills the engine's memory")
    block_size: int = parameter(32, minimum=1, help="tokens per KV block")
    seed: int = parameter(0, minimum=0, help="of the prompts")

    def __post_init__(self) -> None:
        """Checks each value, then what must hold between them."""
        super().__post_init__()
        if self.plot is not None:
            if self.plot_kind not in ("svg", "png"):
                raise ConfigError(f"plot={self.plot!r} must end in .svg or .png")
            if Path(self.plot).resolve() == Path(self.out).resolve():
                raise ConfigError(f"{self.plot} is named twice: profile and plot must differ")

        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}: each running sequence takes a token of a step"
            )
        if self.name is not None:
            check_profile_name(self.name)

    @property
    def plot_kind(self) -> str:
        """The plot's file format, by its ending."""
        return Path(self.plot or "").suffix.lower().removeprefix(".")

    @property
    def output_files(self) -> list[Path]:
        """Every file the calibration writes."""
        return [Path(name) for name in (self.out, self.plot) if name is not None]
