"""The selection of adapters: those that it may take for a caller, and the request that follows."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
import pytest

from lori.auto_weights import Selection, Shares
from lori.gaussians import Array, Gaussians
from lori.prompt_statistics import NUM_FEATURES, Background, PromptStatistics
from lori.template import Message
from server.engine.adapter_selection import AdapterSelector, PendingSelection
from server.engine.adapters.registry import Registered, Registry
from server.engine.admission import Admission
from server.engine.generate_request import Caps, GenerateRequest, RefusedError, TokenPrompt
from tests.lori.features import spherical
from tests.server.registered import registered
from tests.tiny import tiny_tokenizer

CHAT: Sequence[Message] = [Message(role="user", content="2+3")]


def gaussian(*place: float) -> Gaussians:
    return spherical(np.pad(place, (0, NUM_FEATURES - len(place))), 0.1)


BACKGROUND = Background("b" * 64, np.zeros(NUM_FEATURES, np.float32), np.eye(NUM_FEATURES, dtype=np.float32), gaussian())


def adapter(name: str, digit: str, place: tuple[float, ...] | None = None, **fields: Any) -> Registered:
    """Return an adapter whose prompts are at `place`; without statistics if that is None."""
    one = registered(name, digit * 64, **fields)
    statistics = PromptStatistics(digit * 64, BACKGROUND.digest, gaussian(*place)) if place else None
    return replace(one, summary=replace(one.summary, prompt_statistics=statistics))


MATH, LAW = adapter("math", "1", (9.0,)), adapter("law", "2", (0.0, 9.0))
SUMS = adapter("a-sums", "1", (9.0,), folder="math")
"""An alias of `math`."""
OLD = adapter("old-sums", "6", (9.0,), folder="math")
"""An alias of an older version of `math`."""


class Rig:
    """A selector of registered adapters."""

    def __init__(self, *adapters: Registered, max_terms: int = 4, max_nnz: float = inf) -> None:
        self.registry = Registry(adapters)
        self.admission = Admission(tiny_tokenizer(), self.registry, 200, max_terms, max_nnz, background=BACKGROUND)
        self.selector = AdapterSelector(self.registry, self.admission, BACKGROUND, 3, 0.5)

    def prepare(self, *, must_be_current: bool = False, **fields: Any) -> PendingSelection:
        request = GenerateRequest(**{"prompt": "2+3", "adapters": ("auto",)} | fields)
        return self.selector.prepare(request, must_be_current=must_be_current)

    def select(self, *place: float, **fields: Any) -> GenerateRequest:
        """Return the request that follows for a prompt whose features are at `place`."""
        pending = self.prepare(**fields)
        z: Array = gaussian(*place).means[0].astype(np.float64)
        return self.selector.resolve(pending, pending.query.evaluate(z))


def test_the_nearest_adapter_is_named_with_its_version() -> None:
    rig = Rig(MATH, LAW, adapter("code", "3"))
    request = rig.select(9.0)
    assert (request.adapters, request.weights, request.base_share) == (("math@111111111111",), (1.0,), 0.0)
    assert [term.name for term in rig.admission.admit(request).terms] == ["math"]
    assert rig.admission.admit(request).base_share == 0.0
    request = rig.select(0.0, 0.0, 9.0)
    assert (request.adapters, request.weights, request.base_share) == ((), None, 1.0)


def test_a_caller_gets_only_adapters_of_its_own() -> None:
    rig = Rig(MATH, SUMS, LAW)
    assert rig.select(9.0).adapters == ("math@111111111111",), "the own name comes before the alias"
    assert rig.select(9.0, may_use=lambda name: name != "math").adapters == ("a-sums@111111111111",)
    assert rig.select(9.0, may_use=lambda name: name == "law").adapters == ()
    with pytest.raises(
        RefusedError,
        match="none of your adapters that could be selected has statistics of its prompts",
    ):
        rig.prepare(may_use=lambda _: False)


def test_adapters_of_the_policy_are_not_chosen() -> None:
    rig = Rig(MATH, SUMS, LAW)
    assert rig.select(9.0, policy=(("a-sums", 1.0),)).adapters == ()
    assert rig.select(9.0, policy=(("law", 1.0),)).adapters == ("math@111111111111",)


def test_no_version_of_an_adapter_of_the_policy_is_selected() -> None:
    request = Rig(MATH, OLD, LAW).select(9.0, policy=(("math", 1.0),))
    assert request.adapters == ()
    rig = Rig(MATH, OLD, LAW)
    assert rig.admission.admit(rig.select(0.0, 9.0, policy=(("old-sums", 1.0),))).terms[0].name == "law"
    assert rig.select(9.0, policy=(("old-sums", 1.0),)).adapters == ()


def test_of_several_versions_one_is_selected() -> None:
    rig = Rig(MATH, OLD, adapter("canary", "7", (9.0,), folder="math"))
    assert rig.select(9.0).adapters == ("math@111111111111",)
    assert rig.select(9.0, may_use=lambda name: name != "math").adapters == ("canary@777777777777",)


def test_while_another_thread_builds_the_index_the_old_one_is_used() -> None:
    rig = Rig(LAW)
    assert rig.select(9.0).adapters == ()
    rig.registry.put(MATH)
    with rig.selector._lock:
        assert rig.select(9.0).adapters == ()
    assert rig.select(9.0, must_be_current=True).adapters == ("math@111111111111",)


def test_an_adapter_that_the_old_index_does_not_have_is_waited_for() -> None:
    """Regression: while another thread built the index, a caller whose only adapter had just come was refused."""
    rig = Rig(LAW)
    rig.select(0.0, 9.0)
    rig.registry.put(MATH)
    built = threading.Event()

    def build() -> None:
        with rig.selector._lock:
            built.set()
            time.sleep(0.05)

    thread = threading.Thread(target=build)
    thread.start()
    built.wait()
    assert rig.select(9.0, may_use=lambda name: name == "math").adapters == ("math@111111111111",)
    thread.join()
    with pytest.raises(RefusedError, match="none of your adapters that could be selected"):
        rig.prepare(may_use=lambda name: name == "code")


@pytest.mark.parametrize("prompt", ["2+3" * 100, TokenPrompt((10**6,)), TokenPrompt((1,) * 200)])
def test_a_prompt_that_cannot_be_answered_is_refused_before_it_is_read(prompt: str | TokenPrompt) -> None:
    with pytest.raises(RefusedError, match=r"^prompt: "):
        Rig(MATH).prepare(prompt=prompt)


def test_an_adapter_that_comes_or_goes_is_known_at_once() -> None:
    rig = Rig(LAW)
    assert rig.select(9.0).adapters == ()
    rig.registry.put(MATH)
    assert rig.select(9.0).adapters == ("math@111111111111",)
    rig.registry.withdraw("math")
    assert rig.select(9.0).adapters == ()
    rig.registry.withdraw("law")
    with pytest.raises(RefusedError, match="none of your adapters that could be selected has statistics"):
        rig.prepare()


def test_messages_get_adapters_with_a_common_template() -> None:
    chat = adapter("chat", "3", (9.0,), templates=("chat",))
    plain = [adapter(name, digit, (9.0,)) for name, digit in (("plain", "4"), ("plainer", "5"))]
    rig, selection = Rig(chat, *plain), Selection((1, 0, 2), Shares((0.5, 0.25, 0.25), 0.0))
    request = rig.selector.resolve(rig.prepare(prompt=CHAT), selection)
    assert request.adapters == ("plain@444444444444", "plainer@555555555555")
    assert (request.weights, request.base_share) == ((0.6875, 0.3125), 0.0), "they share what the one left out had"
    for fields in ({"prompt": "2+3"}, {"prompt": CHAT, "template": "plain"}):
        assert len(rig.selector.resolve(rig.prepare(**fields), selection).adapters) == 3
    alone = rig.selector.resolve(rig.prepare(prompt=CHAT), Selection((1, 0), Shares((0.4375, 0.4375), 0.125)))
    assert (alone.adapters, alone.weights, alone.base_share) == (("plain@444444444444",), (0.875,), 0.125)


def test_no_more_adapters_are_selected_than_there_is_room_for() -> None:
    same = [adapter(name, digit, (9.0,)) for name, digit in (("one", "1"), ("two", "2"), ("three", "3"))]
    assert len(Rig(*same).select(9.0).adapters) == 3
    assert len(Rig(*same, max_terms=2).select(9.0).adapters) == 2
    assert len(Rig(*same, max_nnz=25).select(9.0).adapters) == 2
    assert len(Rig(*same[:2], LAW, max_terms=2).select(9.0, policy=(("law", 1.0),)).adapters) == 1


def test_the_operator_s_cap_bounds_the_wait() -> None:
    rig = Rig(MATH)
    assert rig.prepare(caps=Caps(max_s=5)).timeout_s == 5
    assert rig.prepare(timeout_s=3, caps=Caps(max_s=5)).timeout_s == 3
    with pytest.raises(RefusedError, match="timeout_s: is 9, expected 5 at most"):
        rig.prepare(timeout_s=9, caps=Caps(max_s=5))
