"""What is said of a name that no adapter has."""

from lori.names import unknown_adapter


def test_near_names_are_told_nearest_first() -> None:
    error = unknown_adapter("saftey", iter(["math", "safety", "safe", "nlu"]))
    assert error.name == "saftey"
    assert error.near == ("safety", "safe")
    assert str(error) == "there is no adapter 'saftey': did you mean 'safety' or 'safe'?"


def test_known_names_are_told_in_order_where_none_is_near() -> None:
    assert str(unknown_adapter("zzz", ["math", "code"])) == "there is no adapter 'zzz': known are 'code', 'math'"


def test_at_most_three_near_names() -> None:
    assert len(unknown_adapter("math", [f"math{i}" for i in range(9)]).near) == 3
