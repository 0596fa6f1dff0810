"""What `tests.bench.composites` takes for an answer in a format, and for a correct one."""

from argparse import ArgumentTypeError

import pytest

from tests.bench.composites import FORMATS, is_correct, parse_weights


@pytest.mark.parametrize(
    ("name", "text", "content"),
    [
        ("upper", " CARD ARRIVAL?\n", "CARD ARRIVAL?"),
        ("upper", " CARD arrival", None),
        ("upper", " 72", None),  # no letter shows the format
        ("json", ' {"answer": "card arrival"}', "card arrival"),
        ("json", '{"answer": 72}', None),
        ("json", '{"answer": "72", "sure": true}', None),
        ("json", '{"answer": "72"', None),
        ("xml", " <answer>card arrival</answer>\n", "card arrival"),
        ("xml", "<answer>a &lt; b</answer>", "a < b"),
        ("xml", "<answer>a & b</answer>", None),
        ("xml", "<answer></answer>", None),
        ("xml", "<answer><b>72</b></answer>", None),
        ("xml", '<answer sure="yes">72</answer>', None),
        ("xml", "<label>72</label>", None),
        ("xml", "<answer>72</answer> or 73", None),
    ],
)
def test_composites_know_the_format_of_an_answer(name: str, text: str, content: str | None) -> None:
    assert FORMATS[name].read(text) == content


@pytest.mark.parametrize("name", FORMATS)
def test_composites_read_what_they_write(name: str) -> None:
    assert str(FORMATS[name].read(FORMATS[name].write("a & b < c"))).casefold() == "a & b < c"


def test_composites_know_a_correct_answer() -> None:
    assert is_correct("intent", {"completion": " card arrival"}, "CARD ARRIVAL")
    assert not is_correct("intent", {"completion": " card arrival"}, "card arrival soon")
    assert is_correct("math", {"answer": "72"}, "She sold 24.\n#### 72")
    assert not is_correct("math", {"answer": "72"}, "72 of 100")
    assert (parse_weights("1,-0.5"), parse_weights("auto,1")) == ((1.0, -0.5), ("auto", 1.0))
    with pytest.raises(ArgumentTypeError, match="has 1 weights, expected two"):
        parse_weights("1")
