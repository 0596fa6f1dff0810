"""Which prompt is first to what a step has room for."""

from server.engine.request import Sequence
from server.engine.scheduling.step_budget import PrefillOrder
from tests.server.plans import request


def prompt(num_tokens: int, *, num_computed: int = 0, priority: int = 0) -> Sequence:
    return Sequence(request(num_tokens, priority=priority), num_computed=num_computed)


def test_every_other_step_begins_with_one_that_has_much_less_left_and_the_others_keep_their_order() -> None:
    turns = PrefillOrder()
    long, longer, short = prompts = [prompt(100), prompt(200), prompt(40)]
    assert [turns.next_order(prompts) for _ in range(4)] == [[short, long, longer], [long, longer, short]] * 2


def test_one_that_has_more_than_half_as_much_left_waits() -> None:
    turns = PrefillOrder()
    prompts = [prompt(100), prompt(51)]
    assert [turns.next_order(prompts) for _ in range(3)] == [prompts] * 3
    prompts[0].num_computed = 40
    assert [turns.next_order(prompts) for _ in range(3)] == [prompts] * 3


def test_what_is_left_counts_and_not_how_long_a_prompt_is() -> None:
    turns = PrefillOrder()
    short, long = prompts = [prompt(40), prompt(1000, num_computed=990)]
    assert turns.next_order(prompts) == [long, short]


def test_who_comes_while_one_alone_is_computed_need_not_wait() -> None:
    turns = PrefillOrder()
    long, short = prompt(100), prompt(10)
    for _ in range(3):
        assert turns.next_order([long]) == [long]
    assert turns.next_order([long, short]) == [short, long]


def test_none_goes_before_one_of_a_higher_priority() -> None:
    turns = PrefillOrder()
    low, high = prompts = [prompt(10, priority=1), prompt(100)]
    assert [turns.next_order(prompts) for _ in range(2)] == [[high, low]] * 2
    higher = prompt(20)
    assert turns.next_order([*prompts, higher]) == [higher, high, low]
