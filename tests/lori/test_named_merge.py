"""Named merges: their files, and what is wrong with some."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from lori.errors import AdapterError
from lori.named_merge import MAX_BYTES, MergedAdapter, NamedMerge, read_named_merges, weights_text

BASE, OTHER = "b" * 64, "c" * 64
MERGE = NamedMerge(
    base_digest=BASE,
    adapters=[
        MergedAdapter(reference="math@0123456789ab", weight=0.7),
        MergedAdapter(reference="safety@abcdefabcdef", weight=-0.25),
    ],
    about="by hand",
    scores={"math.jsonl": 0.9},
)


def test_a_file_reads_back(tmp_path: Path) -> None:
    (tmp_path / "both.json").write_bytes(MERGE.to_bytes())
    (tmp_path / "both.png").write_bytes(b"a plot")
    assert read_named_merges(tmp_path, BASE) == {"both": MERGE}
    assert MERGE.model == "math@0123456789ab:0.7+safety@abcdefabcdef:-0.25"
    assert [adapter.name for adapter in MERGE.adapters] == ["math", "safety"]


def test_block_weights_are_written_where_there_are_any() -> None:
    in_blocks = MergedAdapter(reference="math@0123456789ab", weight=1.0, block_weights=[0.5, 1.5])
    merge = NamedMerge(base_digest=BASE, adapters=[in_blocks, *MERGE.adapters[1:]])
    assert NamedMerge.from_bytes(merge.to_bytes()) == merge
    assert (merge.has_block_weights, MERGE.has_block_weights) == (True, False)
    assert merge.to_bytes().count(b"block_weights") == 1


def test_weights_keep_all_their_digits() -> None:
    references = (f"math@{digit * 12}" for digit in "abc")
    adapters = [MergedAdapter(reference=one, weight=w) for one, w in zip(references, (1 / 3, 1e-5, 2.0), strict=True)]
    merge = NamedMerge(base_digest=BASE, adapters=adapters)
    assert merge.model == "math@aaaaaaaaaaaa:0.3333333333333333+math@bbbbbbbbbbbb:0.00001+math@cccccccccccc:2"


def test_every_fault_of_a_file_is_reported() -> None:
    content = {"adapters": [{"reference": "math", "weight": "1"}], "colour": "red"}
    with pytest.raises(AdapterError) as caught:
        NamedMerge.from_bytes(json.dumps(content).encode())
    faults = str(caught.value)
    expected = ("base_digest: Field required", "adapters.0.reference: String should match", "adapters.0.weight: Input should be")
    assert all(part in faults for part in (*expected, "colour: Extra"))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"base_digest": "b"}, "base_digest: String should match"),
        ({"adapters": []}, "adapters: List should have at least 1 item"),
        ({"adapters": [{"reference": "math@12", "weight": 1.0}]}, "adapters.0.reference: String should match"),
        ({"adapters": [{"reference": "auto@0123456789ab", "weight": 1.0}]}, "'auto' is no adapter's name"),
        ({"adapters": [{"reference": "Math@0123456789ab", "weight": 1.0}]}, "'Math' is no adapter's name"),
        ({"adapters": [{"reference": "math@0123456789ab", "weight": 1.0}] * 2}, "twice, expected each adapter once"),
        ({"adapters": [{"reference": "math@0123456789ab", "weight": 16.5}]}, "less than or equal to 16, found 16.5"),
        ({"adapters": [{"reference": "math@0123456789ab", "weight": float("nan")}]}, "finite"),
        ({"adapters": [{"reference": "math@0123456789ab", "weight": 0.012345678901234568}]}, "more than 17 decimal places"),
        ({"adapters": [{"reference": "math@0123456789ab", "weight": 1.0, "block_weights": [17.0]}]}, "less than or equal to 16"),
        ({"adapters": [{"reference": "math@0123456789ab", "weight": 1.0, "block_weights": [1.0] * 129}]}, "at most 128 items"),
        (
            {"adapters": [{"reference": "math@0123456789ab", "weight": 4.0, "block_weights": [-5.0]}]},
            "is 20, expected 16 at most",
        ),
        ({"scores": {"math.jsonl": float("inf")}}, "finite"),
        ({"scores": {"m" * 1025: 1.0}}, "at most 1024 items"),
        ({"scores": {str(number): 1.0 for number in range(65)}}, "at most 64 items"),
        ({"about": "a" * 4097}, "at most 4096 items"),
        ({"format_version": 2}, "format_version: Input should be 1"),
    ],
)
def test_unsound_content_is_refused(change: dict[str, object], fault: str) -> None:
    with pytest.raises(AdapterError, match=f"it is no sound named merge: .*{fault}"):
        NamedMerge.from_bytes(json.dumps(MERGE.model_dump() | change).encode())


def test_the_largest_merge_is_written_as_it_is_read() -> None:
    adapters = [
        MergedAdapter(
            reference=f"{number:064d}@0123456789ab", weight=-0.1234567890123456, block_weights=[-0.1234567890123456e-5] * 128
        )
        for number in range(64)
    ]
    scores = {"\x01" * 1023 + chr(256 + number): 0.1234567890123456 for number in range(64)}
    merge = NamedMerge(base_digest=BASE, adapters=adapters, about="\x01" * 4096, scores=scores)
    content = merge.to_bytes()
    assert len(content) <= MAX_BYTES
    assert NamedMerge.from_bytes(content) == merge


@pytest.mark.parametrize("change", [{"about": "\ud800"}, {"scores": {"\ud800": 1.0}}])
def test_text_that_no_file_can_hold_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="surrogate"):
        NamedMerge.model_validate(MERGE.model_dump() | change)


def test_a_file_that_is_deleted_meanwhile_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gone", "here"):
        (tmp_path / f"{name}.json").write_bytes(MERGE.to_bytes())

    def listed(folder: Path) -> Iterator[Path]:
        files = [folder / "gone.json", folder / "here.json"]
        files[0].unlink()
        return iter(files)

    monkeypatch.setattr(Path, "iterdir", listed)
    assert [*read_named_merges(tmp_path, BASE)] == ["here"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 10_000])
def test_what_is_no_merge_is_refused(content: bytes) -> None:
    with pytest.raises(AdapterError, match="it is no sound named merge"):
        NamedMerge.from_bytes(content)


@pytest.mark.parametrize(("key", "value"), [("about", '""'), ("weight", "0.5")])
def test_a_key_that_is_there_twice_is_refused(key: str, value: str) -> None:
    content = MERGE.to_bytes().replace(f'"{key}":'.encode(), f'"{key}": {value}, "{key}":'.encode())
    with pytest.raises(AdapterError, match=f"has '{key}' twice in one object"):
        NamedMerge.from_bytes(content)


def test_all_files_of_a_folder_are_checked(tmp_path: Path) -> None:
    (tmp_path / "Both.json").write_bytes(MERGE.to_bytes())
    (tmp_path / "auto.json").write_bytes(MERGE.to_bytes())
    (tmp_path / "other.json").write_bytes(MERGE.model_copy(update={"base_digest": OTHER}).to_bytes())
    (tmp_path / "broken.json").write_bytes(b"{")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "large.json").write_bytes(b" " * (MAX_BYTES + 1))
    (tmp_path / "link.json").symlink_to(tmp_path / "absent")
    with pytest.raises(AdapterError) as caught:
        read_named_merges(tmp_path, BASE)
    faults = str(caught.value).splitlines()
    assert len(faults) == 7
    assert any("link.json cannot be read: " in fault for fault in faults)
    assert any("Both.json: 'Both' is no adapter's name" in fault for fault in faults)
    assert any("auto.json: 'auto' is reserved" in fault for fault in faults)
    assert any(f"other.json: base_digest is {OTHER}, expected {BASE}" in fault for fault in faults)
    assert any("large.json cannot be read: it has" in fault for fault in faults)
    assert any("folder.json cannot be read: it is not a regular file" in fault for fault in faults)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_named_merges(tmp_path / "none", BASE)


def test_many_weights_are_shown_by_their_range() -> None:
    assert weights_text([0.9]) == "0.9"
    assert weights_text([0.9, -0.45, 1, 2]) == "0.9 -0.45 1 2"
    assert weights_text([0.9, -0.45, 1, 2, 0.1]) == "-0.45…2 (in 5 blocks)"
