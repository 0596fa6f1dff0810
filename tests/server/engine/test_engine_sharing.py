"""Blocks, slots and steps shared by requests: sharing changes when requests are answered, and never their answers."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lori.base_model import BaseModel
from lori.merge_options import MergeOptions
from lori.store.store import AdapterStore
from server.engine.generate_request import GenerateRequest
from server.engine.request import SamplingParams
from tests.server.rig import Heard, Rig, WatchedRunner, build, write_adapter

FOX = "The quick brown fox jumps over the lazy dog. "
WARM = SamplingParams(temperature=1.0, top_k=12)
MANY = (
    GenerateRequest(prompt=FOX, max_tokens=40, sampling=SamplingParams(num_logprobs=1)),
    GenerateRequest(prompt="a", max_tokens=60, adapters=("math",)),
    GenerateRequest(
        prompt=FOX[:20], max_tokens=50, adapters=("math", "safety"), sampling=SamplingParams(echo=True, num_logprobs=2)
    ),
    GenerateRequest(prompt="hello", max_tokens=60, sampling=replace(WARM, seed=5), adapters=("intent",)),
    GenerateRequest(prompt="x" * 16, max_tokens=48, sampling=replace(WARM, presence_penalty=0.5, repetition_penalty=1.2, seed=6)),
    GenerateRequest(
        prompt=FOX[:33], max_tokens=40, adapters=("safety",), sampling=replace(WARM, min_tokens=10, min_p=0.01, seed=7)
    ),
)


def values(heard: Heard) -> list[float]:
    return [one.value for one in heard.logprobs if one.value is not None]


def assert_same(actual: list[Heard], expected: list[Heard]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.tokens == other.tokens
        assert one.text == other.text
        assert values(one) == pytest.approx(values(other), abs=1e-4)
        assert replace(one.done, num_cached_tokens=0) == replace(other.done, num_cached_tokens=0)


@pytest.mark.slow
@pytest.mark.parametrize(("num_blocks", "block_size"), [(8, 16), (27, 4)])
def test_a_preempted_request_has_the_same_answer(writer_model: Path, adapters: Path, num_blocks: int, block_size: int) -> None:
    roomy, tight = build(writer_model, adapters), build(writer_model, adapters, num_blocks=num_blocks, block_size=block_size)
    actual = tight.run(MANY)
    assert tight.scheduler.num_preemptions > 2, "several requests have to be preempted"
    assert sum(heard.sequence.num_preemptions > 0 for heard in actual) > 1
    assert_same(actual, roomy.run(MANY))
    assert not tight.engine.adapter_cache.residents.num_in_use


def test_preempted_choices_have_the_same_answers(writer_model: Path, adapters: Path) -> None:
    ask = GenerateRequest(
        prompt=FOX, max_tokens=40, sampling=replace(WARM, seed=1, num_choices=4, num_logprobs=0, echo=True), adapters=("math",)
    )
    tight, roomy = build(writer_model, adapters, num_blocks=9), build(writer_model, adapters)
    actual = [rig.submit_choices(rig.admission.admit(ask)) for rig in (tight, roomy)]
    tight.finish()
    roomy.finish()
    assert tight.scheduler.num_preemptions
    assert_same(*actual)


@pytest.mark.slow
def test_few_slots_change_only_the_order(writer_model: Path, adapters: Path) -> None:
    one_slot = build(writer_model, adapters, num_slots=2, max_loaded_bytes=0)
    asks = [*MANY, *MANY[::-1]]
    assert_same(one_slot.run(asks), build(writer_model, adapters).run(asks))
    assert one_slot.engine.adapter_cache.residents.num_evictions


@pytest.fixture
def rig(writer_model: Path, adapters: Path) -> Rig:
    return build(writer_model, adapters)


def cached(rig: Rig, ask: GenerateRequest) -> int:
    """Return the number of prompt tokens that were found in the cache."""
    (heard,) = rig.run([ask])
    return heard.done.num_cached_tokens


@pytest.mark.parametrize("names", [(), ("math",), ("safety", "intent")])
def test_a_prompt_that_was_computed_before_is_not_computed_again(
    rig: Rig, writer_model: Path, adapters: Path, names: tuple[str, ...]
) -> None:
    first = GenerateRequest(prompt=FOX * 2, max_tokens=20, adapters=names, sampling=SamplingParams(num_logprobs=0))
    longer = replace(first, prompt=FOX * 2 + "And then?", max_tokens=30)
    (one,) = rig.run([first])
    runner = WatchedRunner(rig)
    two, three = rig.run([first, longer])
    assert (one.done.num_cached_tokens, two.done.num_cached_tokens, three.done.num_cached_tokens) == (0, 80, 80)
    assert runner.num_tokens == (90 - 80 + 19) + (99 - 80 + 29)
    assert_same([two, three], build(writer_model, adapters).run([first, longer], [0, 40]))
    assert_same([one], [two])


def test_an_answer_is_found_in_the_cache_as_part_of_the_next_prompt(rig: Rig, writer_model: Path) -> None:
    (first,) = rig.run([GenerateRequest(prompt=FOX, max_tokens=60)])
    whole = GenerateRequest(prompt=FOX + first.text + " More?", max_tokens=10)
    (second,) = rig.run([whole])
    assert second.done.num_cached_tokens == (len(FOX) + 59) // 16 * 16
    assert_same([second], build(writer_model).run([whole]))


@pytest.mark.slow
def test_keys_are_not_shared_between_adapters_weights_and_merges(rig: Rig, writer_model: Path, adapters: Path) -> None:
    routes: list[dict[str, object]] = [
        {},
        {"adapters": ("math",)},
        {"adapters": ("math",), "weights": (0.5,)},
        {"adapters": ("safety",)},
        {"adapters": ("math", "safety")},
        {"adapters": ("math", "safety"), "weights": (0.5, 0.25)},
        {"adapters": ("math", "safety"), "weights": (0.25, 0.5)},
        {"adapters": ("math", "safety"), "merge": MergeOptions("ties")},
        {"adapters": ("math", "safety"), "merge": MergeOptions("ties", density=0.25)},
        {"adapters": ("math", "safety"), "merge": MergeOptions("dare_linear", seed=1)},
        {"adapters": ("math", "safety"), "merge": MergeOptions("dare_linear", seed=2)},
    ]
    asks = [GenerateRequest(prompt=FOX * 2, max_tokens=12, sampling=SamplingParams(num_logprobs=0), **route) for route in routes]
    actual = [rig.run([ask])[0] for ask in asks]
    assert [heard.done.num_cached_tokens for heard in actual] == [0] * len(asks)
    assert_same(actual, [build(writer_model, adapters).run([ask])[0] for ask in asks])
    again = [rig.run([ask])[0] for ask in asks]
    assert [heard.done.num_cached_tokens for heard in again] == [80] * len(asks)
    assert_same(again, actual)


def test_equal_adapters_weights_and_merges_share_their_keys(rig: Rig) -> None:
    def run(**route: object) -> int:
        return rig.run([GenerateRequest(prompt=FOX * 2, max_tokens=4, **route)])[0].done.num_cached_tokens

    run(adapters=("math", "safety"), weights=(0.25, 0.75))
    assert run(adapters=("safety", "math"), weights=(0.75, 0.25)) == 80
    run()
    assert run(adapters=("math",), weights=(0.0,)) == 80
    run(adapters=("math", "safety"), merge=MergeOptions("magnitude", density=0.5, seed=1))
    assert run(adapters=("safety", "math"), merge=MergeOptions("magnitude", density=0.5, seed=2)) == 80, (
        "the seed does not matter for this method"
    )


def test_versions_of_an_adapter_do_not_share_keys_and_names_of_one_do(
    writer_model: Path, writer: BaseModel, tmp_path: Path
) -> None:
    store = AdapterStore(tmp_path / "store")
    for seed in (1, 2):
        write_adapter(tmp_path / "math", writer, seed=seed)
        store.publish(tmp_path / "math")
        store.alias("old" if seed == 1 else "new", "math")
        shutil.rmtree(tmp_path / "math")
    rig = build(writer_model, tmp_path / "store")
    assert rig.registry.by_name["old"].summary.digest != rig.registry.by_name["math"].summary.digest
    asks = {name: GenerateRequest(prompt=FOX * 2, max_tokens=12, adapters=(name,)) for name in ("old", "math", "new")}
    heard = {name: rig.run([ask])[0] for name, ask in asks.items()}
    assert [heard[name].done.num_cached_tokens for name in asks] == [0, 0, 80]
    assert heard["old"].tokens != heard["math"].tokens == heard["new"].tokens
    (both,) = rig.run([GenerateRequest(prompt=FOX, max_tokens=12, adapters=("math", "new"), weights=(0.25, 0.75))])
    (one,) = rig.run([GenerateRequest(prompt=FOX, max_tokens=12, adapters=("math",))])
    assert both.tokens == one.tokens, "the weights of two names of one adapter add up"


def test_a_scored_prompt_is_computed_though_it_is_cached(rig: Rig) -> None:
    rig.run([GenerateRequest(prompt=FOX * 2, max_tokens=1)])
    (scored,) = rig.run([GenerateRequest(prompt=FOX * 2, max_tokens=1, sampling=SamplingParams(echo=True, num_logprobs=0))])
    assert scored.done.num_cached_tokens == 0
    assert len(scored.logprobs) == 91
    (echoed,) = rig.run([GenerateRequest(prompt=FOX * 2, max_tokens=1, sampling=SamplingParams(echo=True))])
    assert echoed.done.num_cached_tokens == 80


def test_of_waiting_requests_the_lowest_priority_number_runs_first(writer_model: Path) -> None:
    rig = build(writer_model, max_batch=1)
    heard = [rig.ask(GenerateRequest(prompt="a", max_tokens=3, priority=priority)) for priority in (0, 5, -1, 5, 2)]
    order: list[int] = []
    while rig.scheduler.has_work:
        rig.step()
        order += [place for place, one in enumerate(heard) if one.is_done and place not in order]
    assert order == [2, 0, 4, 1, 3]


def test_of_running_requests_the_highest_priority_number_is_preempted(writer_model: Path) -> None:
    rig = build(writer_model, num_blocks=6)
    urgent, patient = (rig.ask(GenerateRequest(prompt="a" * 17, max_tokens=60, priority=priority)) for priority in (-1, 3))
    rig.finish()
    assert urgent.sequence.num_preemptions == 0
    assert patient.sequence.num_preemptions > 0


def test_tenants_take_turns(writer_model: Path) -> None:
    rig = build(writer_model, max_batch=1)
    heard = [rig.ask(GenerateRequest(prompt="a", max_tokens=5, tenant=tenant)) for tenant in ("many", "many", "many", "one")]
    order: list[int] = []
    while rig.scheduler.has_work:
        rig.step()
        order += [place for place, one in enumerate(heard) if one.is_done and place not in order]
    assert order.index(3) == 1, "a tenant does not wait for all earlier requests of another"
