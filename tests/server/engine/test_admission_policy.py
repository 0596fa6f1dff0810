"""The operator's policy, adapters added to every request of a caller: it is applied, shown, and cannot be undone."""

from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from lori.errors import UnknownAdapterError
from lori.merge import MergeOptions
from lori.template import Message
from server.engine.adapters.registry import PolicyError, Registry
from server.engine.admission import Admission
from server.engine.generate_request import GenerateRequest, RefusedError
from server.routes.generate import to_adapters, to_merge
from tests.server.registered import registered

CONTEXT = 100
MATH, OTHER_BASIS, GUARD, OLD_GUARD = "1" * 64, "2" * 64, "a" * 64, "b" * 64
TIES = MergeOptions("ties")


@pytest.fixture
def registry() -> Registry:
    """Return math and law, which may be named, guard in two versions, an alias of the old one, and a copy of the new one."""
    current = [
        registered("math", MATH, nnz=100, templates=("chat",)),
        registered("law", OTHER_BASIS, stream=1, nnz=100, templates=("chat",)),
        registered("guard", GUARD, stream=1, nnz=50),
        registered("shield", OLD_GUARD, folder="guard", nnz=70),
        registered("copy", GUARD, stream=1, nnz=50),
    ]
    return Registry(current, [registered("guard", OLD_GUARD, nnz=70)])


@pytest.fixture
def admission(tokenizer: PreTrainedTokenizerFast, registry: Registry) -> Admission:
    return Admission(tokenizer, registry, CONTEXT, max_terms=3)


GUARDED = GenerateRequest(prompt="x", policy=(("guard", 0.7),))


def refusal(admission: Admission, ask: GenerateRequest) -> str:
    with pytest.raises(RefusedError) as caught:
        admission.admit(ask)
    assert caught.value.field == "adapter"
    return caught.value.message


def test_the_policy_is_added_to_any_adapters(admission: Admission) -> None:
    for names in ((), ("math",), ("math", "law")):
        request = admission.admit(replace(GUARDED, adapters=names))
        assert [term.name for term in request.terms] == [*names]
        assert [(term.name, term.digest, term.weight) for term in request.policy] == [("guard", GUARD, 0.7)]
        assert (GUARD, 0.7) in request.residents
        assert len(request.residents) == len(names) + 1


def test_the_policy_does_not_change_the_weights_of_the_request(admission: Admission) -> None:
    """Only the adapters that the client names count for the default 1/n and for the number of weights."""
    request = admission.admit(replace(GUARDED, adapters=("math", "law")))
    assert [term.weight for term in request.terms] == [0.5, 0.5]
    request = admission.admit(replace(GUARDED, adapters=("math",), weights=(2.0,)))
    assert [term.weight for term in request.terms] == [2.0]
    with pytest.raises(RefusedError, match="weights: has 2 weights, expected 1"):
        admission.admit(replace(GUARDED, adapters=("math",), weights=(2.0, 0.0)))


def test_the_policy_is_shown_as_a_policy(admission: Admission) -> None:
    request = admission.admit(replace(GUARDED, adapters=("math",)))
    assert [(adapter.name, adapter.version, adapter.weight, adapter.policy) for adapter in to_adapters(request)] == [
        ("math", "1" * 12, 1.0, False),
        ("guard", "a" * 12, 0.7, True),
    ]
    alone = admission.admit(GUARDED)
    assert [adapter.policy for adapter in to_adapters(alone)] == [True]
    merge = to_merge(alone)
    assert merge is not None
    assert merge.method == "linear"
    assert to_merge(admission.admit(replace(GUARDED, policy=()))) is None


def test_a_policy_may_have_versions_and_several_adapters(admission: Admission) -> None:
    request = admission.admit(replace(GUARDED, policy=(("guard@b", 0.5), ("copy", -1.0))))
    assert [(term.reference, term.weight) for term in request.policy] == [
        ("guard@bbbbbbbbbbbb", 0.5),
        ("copy@aaaaaaaaaaaa", -1.0),
    ]


def test_the_policy_does_not_choose_the_template(admission: Admission) -> None:
    """guard has only the template `plain`, math only `chat`."""
    messages = (Message(role="user", content="hello"),)
    chat = admission.admit(GenerateRequest(prompt=messages)).prompt_text
    assert admission.admit(replace(GUARDED, prompt=messages)).prompt_text == chat
    assert admission.admit(replace(GUARDED, prompt=messages, adapters=("math",))).prompt_text == chat


@pytest.mark.parametrize(
    ("policy", "reference"),
    [
        pytest.param("guard", "guard", id="by its name"),
        pytest.param("guard", "guard@a", id="by its version"),
        pytest.param("guard", "guard@b", id="by another version"),
        pytest.param("guard@b", "guard", id="by the current version"),
        pytest.param("guard", "shield", id="by an alias of another version"),
        pytest.param("shield", "guard", id="by the name behind the alias"),
        pytest.param("shield", "shield", id="by the alias"),
        pytest.param("guard", "copy", id="by another name of the same content"),
        pytest.param("copy", "guard@a", id="by a version of the same content"),
    ],
)
def test_an_adapter_of_the_policy_cannot_be_named_so_no_weight_undoes_it(
    admission: Admission, policy: str, reference: str
) -> None:
    for adapters, weights in (((reference,), (-0.7,)), (("math", reference), (1.0, 0.0))):
        message = refusal(
            admission, GenerateRequest(prompt="x", adapters=adapters, weights=weights, policy=((policy, 0.7),), tenant="they")
        )
        assert message == f"names {reference!r}, which the operator adds to every request of 'they'"


def test_a_policy_may_have_adapters_that_the_caller_may_not_use(admission: Admission) -> None:
    """The policy itself is no secret, as replies show it. Adapters that resemble it are."""
    ask = replace(GUARDED, may_use=lambda name: name == "math")
    assert [term.name for term in admission.admit(replace(ask, adapters=("math",))).policy] == ["guard"]
    for name in ("guard", "guard@a", "guard@f"):
        assert "which the operator adds" in refusal(admission, replace(ask, adapters=(name,)))
    for name in ("shield", "copy", "nobody"):
        with pytest.raises(UnknownAdapterError) as caught:
            admission.admit(replace(ask, adapters=(name,)))
        assert str(caught.value) == f"there is no adapter {name!r}: known are 'math'"


@pytest.mark.parametrize("reference", ["nobody", "guard@f", "gaurd", "guard@", "", "several@c"])
@pytest.mark.parametrize("names", [(), ("math",), ("nobody",)])
def test_no_request_is_answered_without_its_policy(
    admission: Admission, registry: Registry, names: tuple[str, ...], reference: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The log names the missing adapter. The error does not, as the client may not be allowed to know that name."""
    registry.put(registered("several", "c1" * 32), [registered("several", "c2" * 32)])
    with pytest.raises(PolicyError) as caught:
        admission.admit(GenerateRequest(prompt="x", adapters=names, policy=(("copy", 1.0), (reference, 1.0)), tenant="they"))
    assert str(caught.value) == "the operator's adapters cannot be added to this request, and it is not served without them"
    assert f"requests of tenant 'they' fail: its policy names {reference}, which is not there" in caplog.text


def test_the_policy_takes_places_among_the_adapters_that_can_be_resident(
    tokenizer: PreTrainedTokenizerFast, registry: Registry
) -> None:
    two = Admission(tokenizer, registry, CONTEXT, max_terms=2)
    ask = replace(GUARDED, adapters=("math", "law"))
    assert len(two.admit(replace(ask, policy=())).residents) == 2
    assert refusal(two, ask) == "names 2 adapters beside 1 of the operator's, expected at most 2"
    assert len(two.admit(replace(ask, adapters=("math",))).residents) == 2
    same_basis = replace(ask, adapters=("law", "copy"), policy=(("math", 1.0),), merge=TIES)
    assert len(two.admit(same_basis).residents) == 2, "a merge takes one place"
    assert refusal(two, replace(same_basis, policy=(("math", 1.0), ("shield", 1.0)))).startswith("names 2 adapters beside 2 of")


def test_the_policy_takes_memory_for_adapters(tokenizer: PreTrainedTokenizerFast, registry: Registry) -> None:
    small = Admission(tokenizer, registry, CONTEXT, max_terms=3, max_nnz=149)
    ask = replace(GUARDED, adapters=("math",))
    message = refusal(small, ask)
    assert "names 'math', 'guard', which keep 150 entries of B, expected at most 149" in message
    assert small.admit(replace(ask, policy=())).residents
    assert small.admit(replace(ask, weights=(0.0,))).residents == ((GUARD, 0.7),)
    assert len(small.admit(replace(ask, merge=TIES)).residents) == 2, "the nnz of a merge is not known before it is built"
    tiny = Admission(tokenizer, registry, CONTEXT, max_terms=3, max_nnz=49)
    assert "names 'guard', which keeps 50 entries" in refusal(tiny, replace(ask, merge=TIES))


def test_the_policy_is_added_beside_a_merge_and_on_any_basis(admission: Admission) -> None:
    """guard is on another basis than math: it is added to the result of the merge, not merged."""
    ask = replace(GUARDED, adapters=("math",), merge=TIES)
    guarded, bare = admission.admit(ask), admission.admit(replace(ask, policy=()))
    assert guarded.merged_digest == bare.merged_digest
    assert guarded.merged_digest is not None
    assert set(guarded.residents) == {*bare.residents, (GUARD, 0.7)}
    with pytest.raises(RefusedError, match="ties needs adapters on one basis"):
        admission.admit(replace(ask, adapters=("math", "law")))


def test_only_the_policy_is_resident_where_all_weights_are_0(admission: Admission) -> None:
    request = admission.admit(replace(GUARDED, adapters=("math",), weights=(0.0,), merge=TIES))
    assert request.merged_digest is None
    assert request.residents == ((GUARD, 0.7),)
