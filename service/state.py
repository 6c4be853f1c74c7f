"""The file of promotions: kept over restarts, and shared by replicas that see the same file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from batchpilot.agents.parameters import ConfigError
from batchpilot.service.groups import Promotion


def read_promotions(path: Path | None) -> dict[str, Promotion]:
    """Reads the file; no promotions where there is none.

    Raises:
        ConfigError: It cannot be read, or is not what `write_promotions` writes.
    """
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); remove it to forget promotions") from None
    try:
        return {
            str(group): Promotion(
                configured=str(values["configured"]),
                policy=str(values["policy"]),
                canary_policy=str(values["canary_policy"]),
                canary_share=float(values["canary_share"]),
                history=tuple(map(str, values["history"])),
                held_policy=str(values.get("held_policy", "")),
                held_until=float(values.get("held_until", 0.0)),
            )
            for group, values in content["groups"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: not a file of promotions ({error!r}); remove it to forget promotions"
        ) from None


def write_promotions(path: Path, promotions: Mapping[str, Promotion]) -> None:
    """Replaces the file in one step.

    Raises:
        OSError: It cannot be written; the file before stays.
    """
    content = {"groups": {group: asdict(p) for group, p in sorted(promotions.items())}}
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
