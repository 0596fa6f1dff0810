"""Stop strings in a text that comes in pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.text import StopStrings, find_partial


def pieces(stops: tuple[str, ...], *parts: str) -> list[str]:
    found = StopStrings(stops)
    return [*map(found.push, parts), found.flush()]


@pytest.mark.parametrize(
    ("text", "stops", "given_on"),
    [
        ("abc", (), "abc"),
        ("abc", ("x",), "abc"),
        ("abc", ("cd",), "ab"),
        ("abc", ("bcd", "cx"), "a"),
        ("aaa", ("aab",), "a"),
        ("ab", ("abab",), ""),
        ("", ("ab",), ""),
        ("x€", ("€uro",), "x"),
    ],
)
def test_as_much_is_held_back_as_could_begin_a_stop(text: str, stops: tuple[str, ...], given_on: str) -> None:
    assert pieces(stops, text) == [given_on, text[len(given_on) :]]


@pytest.mark.parametrize(
    ("text", "stop", "start", "place"),
    [
        ("abab", "ab", 0, 0),
        ("abab", "ab", 1, 2),
        ("abac", "ab", 1, 4),
        ("abca", "ab", 1, 3),
        ("ab", "ab", 2, 2),
        ("aab", "ab", 0, 1),
    ],
)
def test_a_beginning_is_all_of_a_stop_or_reaches_the_end(text: str, stop: str, start: int, place: int) -> None:
    assert find_partial(text, stop, start) == place


def test_what_only_began_like_a_stop_is_given_on_at_once() -> None:
    assert pieces(("ENDING",), "an", " EN", "D", "game", "E") == ["an", " ", "", "ENDgame", "", "E"]


def test_of_stops_that_end_in_one_piece_the_one_that_begins_first_cuts() -> None:
    assert pieces(("c", "abc"), "xx", "abcd") == ["xx", "", ""]


def test_what_ends_while_no_stop_may_is_text() -> None:
    found = StopStrings(("END", "aa"))
    assert found.push("1END2EN", can_stop=False) == "1END2"
    assert found.push("Da", can_stop=False) == "END"
    assert not found.is_met
    assert found.push("ab", can_stop=True) == ""
    assert found.is_met


def test_a_stop_may_share_characters_with_one_that_did_not_count() -> None:
    found = StopStrings(("aa",))
    assert found.push("xaa", can_stop=False) == "xa"
    assert found.push("a") == ""
    assert found.is_met


letters = st.text("ab", max_size=30)


def first_cut(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The text as it grows, up to the first character that completes a stop."""
    grown = next((text[:n] for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops)), None)
    if grown is None:
        return text, False
    return grown[: min(grown.find(stop) for stop in stops if stop in grown)], True


@given(letters, st.lists(st.text("ab", min_size=1, max_size=7), max_size=4).map(tuple))
def test_any_text_is_cut_where_its_first_stop_begins(text: str, stops: tuple[str, ...]) -> None:
    found, out, held = StopStrings(stops), "", ""
    for end, character in enumerate(text, 1):
        if found.is_met:
            break
        out += found.push(character)
        held = text[len(out) : end]
        assert found.is_met or not held or any(stop.startswith(held) for stop in stops)
    assert (out + found.flush(), found.is_met) == first_cut(text, stops)


@given(st.lists(st.tuples(st.text("ab", max_size=5), st.booleans())), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_pieces_of_any_size_lose_nothing(parts: list[tuple[str, bool]], stops: list[str]) -> None:
    """Against a search of the whole text for a stop that ends in a piece where it may."""
    found, out, text = StopStrings(tuple(stops)), "", ""
    for piece, can_stop in parts:
        before, text = len(text), text + piece
        out += found.push(piece, can_stop)
        places = [at for stop in stops for at in range(len(text)) if text.startswith(stop, at) and at + len(stop) > before]
        if can_stop and places:
            assert found.is_met
            assert out == text[: min(places)]
            return
        assert not found.is_met
        assert text.startswith(out)
    assert out + found.flush() == text


class CountedText(str):
    """A stop string that counts how often it is compared."""

    num_compared = 0

    def startswith(self, *arguments: str | int) -> bool:
        CountedText.num_compared += 1
        return super().startswith(*arguments)


def test_a_place_is_tried_once_however_long_the_stops_are() -> None:
    num_characters, stops = 4000, tuple(CountedText("a" * 3000 + str(i)) for i in range(3))
    found, CountedText.num_compared = StopStrings(stops), 0
    out = "".join(found.push("a" if i % 3500 else "b") for i in range(num_characters)) + found.flush()
    assert len(out) == num_characters
    assert CountedText.num_compared <= 3 * 2 * num_characters
