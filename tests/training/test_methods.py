"""Training methods: their numbers of parameters, and the memory of their gradients and optimizer states."""

from pathlib import Path

import pytest

from tests.bench.training import Stepper, batches


@pytest.fixture(scope="module")
def steppers() -> dict[str, Stepper]:
    """Return steppers of LoRA and LoRI-S on the embedded model, after one step."""
    result = {method: Stepper(method, None, 32) for method in ("lora", "lori")}
    for stepper in result.values():
        stepper.step(batches(1000, 64)["short"])
    return result


@pytest.mark.model
def test_lori_trains_a_twentieth_of_lora_s_parameters(steppers: dict[str, Stepper]) -> None:
    lora, lori = (steppers[method].footprint() for method in ("lora", "lori"))
    assert lora.num_parameters == 9_768_960
    assert lori.num_parameters == 497_664
    assert lori.num_parameters <= 0.051 * lora.num_parameters


@pytest.mark.model
def test_gradients_and_optimizer_states_cover_only_entries_in_the_mask(steppers: dict[str, Stepper]) -> None:
    lora, lori = (steppers[method].footprint() for method in ("lora", "lori"))
    assert lori.num_bytes == 3 * 4 * lori.num_parameters  # a gradient and AdamW's two moments, fp32
    assert lori.num_bytes <= 0.11 * lora.num_bytes


def test_a_method_without_its_adapters_is_the_base(tiny_model: Path) -> None:
    batch = batches(200, 64)["short"]
    for method in ("lora", "lori"):
        stepper = Stepper(method, str(tiny_model), 4)
        before = stepper.loss(batch)
        for _ in range(3):
            stepper.step(batch)
        assert stepper.loss(batch) != pytest.approx(before, abs=1e-6)
        with stepper.method.adapter_disabled():
            assert stepper.loss(batch) == pytest.approx(before, abs=1e-5)
