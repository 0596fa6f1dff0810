"""What `model` names in OpenAI's routes: the base model, an adapter, or adapters that are added, as `math:0.7+safety:0.3`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from server.schemas.fields import MAX_ADAPTERS, MAX_WEIGHT

PART = re.compile(r"(?P<reference>[a-z0-9][a-z0-9._-]{0,63}(@[0-9a-f]{1,12})?)(:(?P<weight>-?[0-9]{1,9}(\.[0-9]{1,17})?))?")


class UnknownModelError(Exception):
    """No model is called so. The wording is that of vLLM's servers, by which clients know it."""

    def __init__(self, model: str) -> None:
        super().__init__(f"The model `{model}` does not exist.")


class ModelWeightsError(Exception):
    """The weights in a model's name are not sound."""


@dataclass(frozen=True, slots=True)
class NamedModel:
    """References of adapters, and their weights; None: each 1/n."""

    adapters: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None


def model_of(adapters: Sequence[str], weights: Sequence[float]) -> str:
    """Returns what names these adapters with these weights: none of them where each is 1/n."""
    if all(weight == 1 / len(adapters) for weight in weights):
        return "+".join(adapters)
    return "+".join(f"{name}:{_digits(weight)}" for name, weight in zip(adapters, weights, strict=True))


def parse_model(model: str, base_model: str) -> NamedModel:
    """Returns what `model` names. Raises `UnknownModelError`, and `ModelWeightsError` where weights are missing or too large."""
    if model == base_model:
        return NamedModel()
    parts = [PART.fullmatch(part) for part in model.split("+", MAX_ADAPTERS)]
    found = [part for part in parts if part]
    if len(found) < len(parts):
        raise UnknownModelError(model)
    names = tuple(part["reference"] for part in found)
    weights = tuple(float(part["weight"]) for part in found if part["weight"])
    if len(weights) not in (0, len(names)):
        raise ModelWeightsError(f"{model!r} has {len(weights)} weights for {len(names)} adapters, expected one for each, or none")
    if large := [weight for weight in weights if abs(weight) > MAX_WEIGHT]:
        raise ModelWeightsError(f"{model!r} has the weight {large[0]:g}, expected -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
    return NamedModel(names, weights or None)


def _digits(weight: float) -> str:
    return f"{Decimal(repr(weight)).normalize():f}"
