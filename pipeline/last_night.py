"""The world model of the last run over older bars, whose weights the next fit may begin with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import yaml

from configs.schema import WorldModelConfig
from data.fields import Field
from pipeline.inputs import RunInputs, WarmStart
from world_model import MarketModel, ModelFileError
from world_model.storage import model_hash
from world_model.warm_start import refuse_other_network


def with_warm_start(inputs: RunInputs, root: Path) -> RunInputs:
    """The inputs with last night's world model, where `world_model.warm_start` asks for it and there is one.

    It is that of the finished run with the newest bars older than ours, of the same symbol, columns and sizes; so a run
    that is repeated starts from the same one. Its hash is part of the run key.
    """
    if not inputs.config.world_model.warm_start:
        return inputs
    ours, symbol = inputs.table.timestamps[-1], inputs.config.data.source.symbol
    earlier = [(last, folder) for last, folder in _finished(root / "runs", symbol) if last < ours]
    for _, folder in sorted(earlier, reverse=True):
        if _fits(folder / "world_model", inputs.config.world_model, inputs.table.fields):
            return replace(inputs, warm_start=WarmStart(folder / "world_model", model_hash(folder / "world_model")))
    return inputs


# Last bar and folder of every finished run on this symbol; what cannot be read is another version's.
def _finished(runs: Path, symbol: str) -> Iterator[tuple[pd.Timestamp, Path]]:
    for report in runs.glob("*/report.json"):
        try:
            settings = yaml.safe_load((report.parent / "config.yaml").read_text())
            last = pd.Timestamp(json.loads(report.read_text())["windows"]["test"]["last"])
            if settings["data"]["source"]["symbol"] == symbol:
                yield last, report.parent
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            continue


def _fits(folder: Path, config: WorldModelConfig, fields: tuple[Field, ...]) -> bool:
    try:
        refuse_other_network(MarketModel.load(folder), config, fields)
    except (ModelFileError, ValueError):
        return False
    return True
