"""Stop strings in a text that comes in pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.text import StopStrings, find_partial


def pieces(stops: tuple[str, ...], *parts: str) -> list[str]:
    matcher = StopStrings(stops)
    return [*map(matcher.push, parts), matcher.flush()]


@pytest.mark.parametrize(
    ("text", "stops", "emitted"),
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
def test_text_that_could_begin_a_stop_is_held_back(text: str, stops: tuple[str, ...], emitted: str) -> None:
    assert pieces(stops, text) == [emitted, text[len(emitted) :]]


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
def test_a_partial_match_is_a_whole_stop_or_reaches_the_end(text: str, stop: str, start: int, place: int) -> None:
    assert find_partial(text, stop, start) == place


def test_text_that_only_began_like_a_stop_is_emitted_at_once() -> None:
    assert pieces(("ENDING",), "an", " EN", "D", "game", "E") == ["an", " ", "", "ENDgame", "", "E"]


def test_of_stops_that_end_in_one_piece_the_one_that_begins_first_cuts() -> None:
    assert pieces(("c", "abc"), "xx", "abcd") == ["xx", "", ""]


def test_a_stop_that_ends_before_stops_count_is_text() -> None:
    matcher = StopStrings(("END", "aa"))
    assert matcher.push("1END2EN", can_stop=False) == "1END2"
    assert matcher.push("Da", can_stop=False) == "END"
    assert not matcher.is_met
    assert matcher.push("ab", can_stop=True) == ""
    assert matcher.is_met


def test_a_stop_may_share_characters_with_one_that_did_not_count() -> None:
    matcher = StopStrings(("aa",))
    assert matcher.push("xaa", can_stop=False) == "xa"
    assert matcher.push("a") == ""
    assert matcher.is_met


letters = st.text("ab", max_size=30)


def first_cut(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """Return the text before the first stop that the growing text completes, and whether there is one."""
    grown = next((text[:n] for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops)), None)
    if grown is None:
        return text, False
    return grown[: min(grown.find(stop) for stop in stops if stop in grown)], True


@given(letters, st.lists(st.text("ab", min_size=1, max_size=7), max_size=4).map(tuple))
def test_any_text_is_cut_where_its_first_stop_begins(text: str, stops: tuple[str, ...]) -> None:
    matcher, out, held = StopStrings(stops), "", ""
    for end, character in enumerate(text, 1):
        if matcher.is_met:
            break
        out += matcher.push(character)
        held = text[len(out) : end]
        assert matcher.is_met or not held or any(stop.startswith(held) for stop in stops)
    assert (out + matcher.flush(), matcher.is_met) == first_cut(text, stops)


@given(st.lists(st.tuples(st.text("ab", max_size=5), st.booleans())), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_pieces_of_any_size_give_the_same_text_as_a_search_of_the_whole(parts: list[tuple[str, bool]], stops: list[str]) -> None:
    """The reference searches the whole text for stops that end in a piece in which stops count."""
    matcher, out, text = StopStrings(tuple(stops)), "", ""
    for piece, can_stop in parts:
        before, text = len(text), text + piece
        out += matcher.push(piece, can_stop)
        places = [at for stop in stops for at in range(len(text)) if text.startswith(stop, at) and at + len(stop) > before]
        if can_stop and places:
            assert matcher.is_met
            assert out == text[: min(places)]
            return
        assert not matcher.is_met
        assert text.startswith(out)
    assert out + matcher.flush() == text


class CountedText(str):
    """A stop string that counts how often it is compared."""

    num_compared = 0

    def startswith(self, *arguments: str | int) -> bool:
        CountedText.num_compared += 1
        return super().startswith(*arguments)


def test_each_place_is_compared_at_most_twice_per_stop_however_long_the_stops_are() -> None:
    num_characters, stops = 4000, tuple(CountedText("a" * 3000 + str(i)) for i in range(3))
    matcher, CountedText.num_compared = StopStrings(stops), 0
    out = "".join(matcher.push("a" if i % 3500 else "b") for i in range(num_characters)) + matcher.flush()
    assert len(out) == num_characters
    assert CountedText.num_compared <= 3 * 2 * num_characters
