"""Rows for `training.evaluate`, and its figures of them."""

import json
from pathlib import Path

from training.evaluate import evaluate
from training.evaluation.config import EvaluateConfig
from training.evaluation.figures import Figures

Rows = list[dict[str, object]]
RED_ROWS: Rows = [{"prompt": f"Say {i}:", "completion": " red"} for i in range(4)]


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(metric: str, data: Path, **fields: object) -> EvaluateConfig:
    defaults = {"execute_code": True} if metric == "pass" else {}
    return EvaluateConfig.model_validate({"metric": metric, "data": str(data)} | defaults | fields)


def figures_of(config: EvaluateConfig) -> Figures:
    return evaluate(config).figures
