"""Contract of training and serving: a trained, saved and served adapter equals the base with its delta folded in."""

import json
from pathlib import Path

import pytest
import torch

from lori.base_model import load_base_model
from lori.format import load_adapter
from server.engine.generate_request import GenerateRequest
from server.engine.request import Chunk
from server.loading import load_service
from server.settings import Settings
from tests.server.rig import rig_of
from training.config import FitConfig
from training.fit import fit


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store of two adapters of different ranks on one basis, and one on another, trained on different words."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, word, changes in [
        ("first", "red", {}),
        ("second", "blue", {"rank": 6, "sparsity": 0.5}),
        ("other-basis", "green", {"stream": 3}),
    ]:
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"Say {i}:", "completion": f" {word}"}) + "\n" for i in range(9)))
        fields = {"rank": 4, "alpha": 8, "steps": 8, "batch_tokens": 100, "dtype": "float32", "template": ["plain"]}
        fit(
            FitConfig.model_validate(fields | {"data": [str(data)], "model": str(tiny_model), "output": folder / name} | changes),
            "",
        )
    return folder


def folded_logits(tiny_model: Path, adapters: Path, weights: dict[str, float], ids: list[int]) -> torch.Tensor:
    """Return the logits (T, V) of transformers' own model with the weighted deltas added to its weights in float64."""
    base = load_base_model(str(tiny_model), torch.float32)
    for name, weight in weights.items():
        adapter = load_adapter(adapters / name, base.identity)
        for module, b in adapter.modules.items():
            linear = base.model.get_submodule(module)
            a = adapter.basis.draw(module, adapter.config.r, linear.in_features).double()
            delta = weight * adapter.config.lora_alpha / adapter.config.r * b.dense(torch.float64) @ a
            linear.weight.copy_(linear.weight.double() + delta)
    with torch.inference_mode():
        return base.model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"first": 1.0},
        {"other-basis": 1.0},
        {"first": 0.7, "second": 0.5},
        {"first": 1.0, "second": -0.5, "other-basis": 2.0},
    ],
)
def test_served_logits_are_those_of_the_base_with_the_delta_folded_in(
    tiny_model: Path, adapters: Path, weights: dict[str, float]
) -> None:
    service = load_service(Settings(model=str(tiny_model), adapters=adapters, dtype="float32", kv_cache_gib=0.001))
    rig = rig_of(service)
    request = rig.admission.admit(
        GenerateRequest(
            prompt="Say 4: the contract", adapters=tuple(weights), weights=tuple(weights.values()) or None, max_tokens=4
        )
    )
    sequence = rig.start(request).sequence
    num_tokens = len(request.prompt_ids)
    served = rig.runner.forward([Chunk(sequence, 0, num_tokens)], range(num_tokens))
    expected = folded_logits(tiny_model, adapters, weights, list(request.prompt_ids))
    torch.testing.assert_close(served, expected, rtol=1e-4, atol=1e-4)
    if weights:
        assert (served - folded_logits(tiny_model, adapters, {}, list(request.prompt_ids))).abs().max() > 1e-2
