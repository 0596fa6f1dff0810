"""Prefill order: the prompt that gets the room of a step first."""

from server.engine.request import Sequence
from server.engine.scheduling.step_budget import PrefillOrder
from tests.server.plans import request


def prompt(num_tokens: int, *, num_computed: int = 0, priority: int = 0) -> Sequence:
    return Sequence(request(num_tokens, priority=priority), num_computed=num_computed)


def test_every_other_step_begins_with_a_prompt_that_has_much_less_left_and_the_others_keep_their_order() -> None:
    order = PrefillOrder()
    long, longer, short = prompts = [prompt(100), prompt(200), prompt(40)]
    assert [order.next_order(prompts) for _ in range(4)] == [[short, long, longer], [long, longer, short]] * 2


def test_a_prompt_with_more_than_half_as_much_left_waits() -> None:
    order = PrefillOrder()
    prompts = [prompt(100), prompt(51)]
    assert [order.next_order(prompts) for _ in range(3)] == [prompts] * 3
    prompts[0].num_computed = 40
    assert [order.next_order(prompts) for _ in range(3)] == [prompts] * 3


def test_the_remaining_tokens_count_and_not_the_length_of_a_prompt() -> None:
    order = PrefillOrder()
    short, long = prompts = [prompt(40), prompt(1000, num_computed=990)]
    assert order.next_order(prompts) == [long, short]


def test_a_short_prompt_that_joins_a_single_long_one_does_not_wait() -> None:
    order = PrefillOrder()
    long, short = prompt(100), prompt(10)
    for _ in range(3):
        assert order.next_order([long]) == [long]
    assert order.next_order([long, short]) == [short, long]


def test_no_prompt_goes_before_one_of_a_higher_priority() -> None:
    order = PrefillOrder()
    low, high = prompts = [prompt(10, priority=1), prompt(100)]
    assert [order.next_order(prompts) for _ in range(2)] == [[high, low]] * 2
    higher = prompt(20)
    assert order.next_order([*prompts, higher]) == [higher, high, low]
