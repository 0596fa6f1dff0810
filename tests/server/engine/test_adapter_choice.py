"""The choice of adapters: which adapters a caller's prompt may choose, and the request that follows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lori.auto_weights import Choice, Shares
from lori.prompt_statistics import NUM_AXES, NUM_FEATURES, Array, Background, Gaussians, PromptStatistics
from lori.template import Message
from server.engine.adapter_choice import AdapterChooser, Undecided
from server.engine.adapters.registry import Registered, Registry
from server.engine.admission import Admission, GenerateRequest, RefusedError
from tests.server.registered import registered
from tests.tiny import tiny_tokenizer

AXES = np.zeros((1, NUM_AXES, NUM_FEATURES), np.float32)
CHAT: Sequence[Message] = [Message(role="user", content="2+3")]


def gaussian(*place: float) -> Gaussians:
    mean = np.zeros((1, NUM_FEATURES), np.float32)
    mean[0, : len(place)] = place
    return Gaussians(mean, AXES, np.full(1, 0.1, np.float32))


BACKGROUND = Background("b" * 64, np.zeros(NUM_FEATURES, np.float32), np.eye(NUM_FEATURES, dtype=np.float32), gaussian())


def adapter(name: str, digit: str, place: tuple[float, ...] | None = None, **fields: Any) -> Registered:
    """Return an adapter whose prompts are at `place`; without statistics if that is None."""
    one = registered(name, digit * 64, **fields)
    statistics = PromptStatistics(digit * 64, BACKGROUND.digest, gaussian(*place)) if place else None
    return replace(one, summary=replace(one.summary, prompt_statistics=statistics))


MATH, LAW = adapter("math", "1", (9.0,)), adapter("law", "2", (0.0, 9.0))
SUMS = adapter("a-sums", "1", (9.0,), folder="math")
"""An alias of `math`."""


class Rig:
    """A chooser among registered adapters."""

    def __init__(self, *adapters: Registered, max_terms: int = 4) -> None:
        self.registry = Registry(adapters)
        self.admission = Admission(tiny_tokenizer(), self.registry, 200, max_terms=max_terms, background=BACKGROUND)
        self.chooser = AdapterChooser(self.registry, self.admission, BACKGROUND, 3, 0.5)

    def prepare(self, **fields: Any) -> Undecided:
        return self.chooser.prepare(GenerateRequest(**{"prompt": "2+3", "adapters": ("auto",)} | fields))

    def choose(self, *place: float, **fields: Any) -> GenerateRequest:
        """Return the request that follows for a prompt whose features are at `place`."""
        undecided = self.prepare(**fields)
        z: Array = gaussian(*place).means[0].astype(np.float64)
        return undecided.decided(undecided.choice.decide(z, BACKGROUND), self.admission)


def test_the_nearest_adapter_is_named_with_its_version() -> None:
    rig = Rig(MATH, LAW, adapter("code", "3"))
    request = rig.choose(9.0)
    assert (request.adapters, request.weights, request.base_share) == (("math@111111111111",), (1.0,), 0.0)
    assert [term.name for term in rig.admission.admit(request).terms] == ["math"]
    assert rig.admission.admit(request).base_share == 0.0
    request = rig.choose(0.0, 0.0, 9.0)
    assert (request.adapters, request.weights, request.base_share) == ((), None, 1.0)


def test_a_caller_gets_only_adapters_of_its_own() -> None:
    rig = Rig(MATH, SUMS, LAW)
    assert rig.choose(9.0).adapters == ("math@111111111111",), "the own name comes before the alias"
    assert rig.choose(9.0, may_use=lambda name: name != "math").adapters == ("a-sums@111111111111",)
    assert rig.choose(9.0, may_use=lambda name: name == "law").adapters == ()
    with pytest.raises(RefusedError, match="no adapter that you may use has statistics of its prompts"):
        rig.prepare(may_use=lambda _: False)


def test_adapters_of_the_policy_are_not_chosen() -> None:
    rig = Rig(MATH, SUMS, LAW)
    assert rig.choose(9.0, policy=(("a-sums", 1.0),)).adapters == ()
    assert rig.choose(9.0, policy=(("law", 1.0),)).adapters == ("math@111111111111",)


def test_an_adapter_that_comes_or_goes_is_known_at_once() -> None:
    rig = Rig(LAW)
    assert rig.choose(9.0).adapters == ()
    rig.registry.put(MATH)
    assert rig.choose(9.0).adapters == ("math@111111111111",)
    rig.registry.withdraw("math")
    assert rig.choose(9.0).adapters == ()
    rig.registry.withdraw("law")
    with pytest.raises(RefusedError, match="no adapter that you may use has statistics"):
        rig.prepare()


def test_messages_choose_adapters_with_a_common_template() -> None:
    chat = adapter("chat", "3", (9.0,), templates=("chat",))
    plain = [adapter(name, digit, (9.0,)) for name, digit in (("plain", "4"), ("plainer", "5"))]
    rig, choice = Rig(chat, *plain), Choice((1, 0, 2), Shares((0.5, 0.25, 0.25), 0.0))
    request = rig.prepare(prompt=CHAT).decided(choice, rig.admission)
    assert request.adapters == ("plain@444444444444", "plainer@555555555555")
    assert (request.weights, request.base_share) == ((0.5, 0.25), 0.25)
    for fields in ({"prompt": "2+3"}, {"prompt": CHAT, "template": "plain"}):
        assert len(rig.prepare(**fields).decided(choice, rig.admission).adapters) == 3


def test_no_more_adapters_are_chosen_than_can_be_resident_together() -> None:
    same = [adapter(name, digit, (9.0,)) for name, digit in (("one", "1"), ("two", "2"), ("three", "3"))]
    assert len(Rig(*same, max_terms=2).choose(9.0).adapters) == 2
    rig = Rig(*same, LAW, max_terms=2)
    assert len(rig.choose(9.0, policy=(("law", 1.0),)).adapters) == 1
