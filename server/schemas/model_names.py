"""Names in OpenAI's `model` field: the base model, an adapter, or a sum of adapters such as `math:0.7+safety:0.3`."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lori.merge_options import MAX_ADAPTERS, MAX_WEIGHT
from lori.names import weight_text
from server.engine.request import RequestedWeight

WEIGHT = r"auto|-?([0-9]{1,9}(\.[0-9]{0,17})?|\.[0-9]{1,17})"
PART = re.compile(rf"\s*(?P<reference>[a-z0-9][a-z0-9._-]{{0,63}}(@[0-9a-f]{{1,12}})?)\s*(:\s*(?P<weight>{WEIGHT})\s*)?")


class UnknownModelError(Exception):
    """No model has this name.

    The first sentence is vLLM's, by which clients recognise the error; `hint` says which models exist.
    """

    def __init__(self, model: str, hint: str) -> None:
        self.name = model
        super().__init__(f"The model `{model}` does not exist. {hint}")


class ModelWeightsError(Exception):
    """The weights in a model's name, or the number of its adapters, are not sound."""


@dataclass(frozen=True, slots=True)
class NamedModel:
    """References of adapters, and their weights. None is the server's default."""

    adapters: tuple[str, ...] = ()
    weights: tuple[RequestedWeight, ...] | None = None


def model_of(adapters: Sequence[str], weights: Sequence[RequestedWeight]) -> str:
    """Return the model name for these adapters and weights.

    It has no weights if all are automatic, or 1/n each, as a request without weights has none.
    """
    if all(weight == "auto" for weight in weights) or all(weight == 1 / len(adapters) for weight in weights):
        return "+".join(adapters)
    return weighted_model_of(adapters, weights)


def weighted_model_of(adapters: Sequence[str], weights: Sequence[RequestedWeight]) -> str:
    """Return the model name for these adapters, with every weight written out."""
    texts = (weight if isinstance(weight, str) else weight_text(weight) for weight in weights)
    return "+".join(f"{name}:{text}" for name, text in zip(adapters, texts, strict=True))


def find_parts(model: str) -> list[re.Match[str] | None]:
    """Return a match for each part between the plus signs of `model`.

    A part that is no reference with an optional weight gives None.
    """
    return [PART.fullmatch(part) for part in model.split("+", MAX_ADAPTERS)]


def is_base(model: str, base_names: Collection[str]) -> bool:
    """Return whether `model` is one of the base model's names. Names of folders may end in a slash."""
    return model in base_names or model.strip().rstrip("/") in base_names


def parse_model(model: str, base_names: Collection[str]) -> NamedModel:
    """Return the adapters that `model` names. Raises `ModelWeightsError` for too many, or for wrong weights.

    A name that cannot be a reference is returned as a single reference. The lookup then raises the error for an unknown adapter,
    with the names that exist.
    """
    if is_base(model, base_names):
        return NamedModel()
    parts = find_parts(model)
    if len(parts) > MAX_ADAPTERS:
        raise ModelWeightsError(f"{model[:60]!r}… names more than {MAX_ADAPTERS} adapters, expected {MAX_ADAPTERS} at most")
    if None in parts:
        return NamedModel((model.split("+", MAX_ADAPTERS)[parts.index(None)].strip(),))
    matches = [part for part in parts if part]
    names = tuple(part["reference"] for part in matches)
    weights = tuple(_parse_weight(part["weight"]) for part in matches if part["weight"])
    if len(weights) not in (0, len(names)):
        raise ModelWeightsError(f"{model!r} has {len(weights)} weights for {len(names)} adapters, expected one for each, or none")
    if large := [weight for weight in weights if weight != "auto" and abs(weight) > MAX_WEIGHT]:
        raise ModelWeightsError(f"{model!r} has the weight {large[0]:g}, expected -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
    return NamedModel(names, weights or None)


def _parse_weight(text: str) -> RequestedWeight:
    return "auto" if text == "auto" else float(text)
