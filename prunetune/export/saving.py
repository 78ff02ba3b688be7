"""Saves the results of a training in a folder: the network, its configuration and its metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from prunetune.config import document
from prunetune.config.schema import Config
from prunetune.data import Dataset
from prunetune.export.files import WEIGHTS, save_model


def save_training(
    folder: Path, config: Config, state: dict[str, Tensor], metrics: Mapping[str, Any], data: Dataset
) -> list[Path]:
    """Write the network's weights, `config.yaml` and `metrics.json`; return the paths of the three files.

    Raises OSError where the folder cannot be written.
    """
    save_model(folder, config, state, data)
    (folder / "config.yaml").write_text(document.dump(config.tree()), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(dict(metrics), indent=1) + "\n")
    return [folder / WEIGHTS, folder / "config.yaml", folder / "metrics.json"]
