"""Ten thousand damaged adapters: each is refused with a reason, or equals the saved adapter."""

import random
from pathlib import Path

import pytest
import torch

from lori.adapter import Adapter
from lori.basis import Explicit, Seeded
from lori.errors import AdapterFormatError
from lori.format import load_adapter
from lori.identity import BaseIdentity
from lori.sparse import VALUE_TYPES, ValueType
from lori.store.bases import BASES_FOLDER
from tests.lori.adapters import BASE, RANK, SHAPES, make_config, make_modules, save, targeted

NUM_DAMAGED = 2500
"""Number of damaged adapters for each type of values; ten thousand in total."""


def is_equal(a: Adapter, b: Adapter) -> bool:
    if a.modules.keys() != b.modules.keys() or (a.name, a.config, a.basis) != (b.name, b.config, b.basis):
        return False
    pairs = [(a.modules[name], b.modules[name]) for name in a.modules]
    return all(torch.equal(ours.indices, theirs.indices) and torch.equal(ours.values, theirs.values) for ours, theirs in pairs)


def load_if_sound(folder: Path, base: BaseIdentity | None) -> Adapter | None:
    """Return the adapter, or `None` if it is refused with a reason. Any other error fails the test."""
    try:
        return load_adapter(folder, base)
    except AdapterFormatError as error:
        if error.faults and all(error.faults):
            return None
        raise


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return `content` truncated, or with one changed bit or byte."""
    at = rng.randrange(len(content))
    match rng.randrange(4):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
        case _:
            return content[:at] + bytes([content[at] ^ rng.randrange(1, 256)]) + content[at + 1 :]


def save_one(folder: Path, values: ValueType, is_explicit: bool) -> Adapter:
    config = make_config(values=values, metrics={"loss": 1.25}, training={"steps": 3}, basis=Seeded(9))
    explicit = Explicit.from_tensors({name: Seeded(9).draw(name, RANK, n) for name, (_, n) in targeted(SHAPES).items()})
    return save(folder, config, make_modules(density=0.15), explicit if is_explicit else None)


@pytest.mark.slow
@pytest.mark.parametrize("values", VALUE_TYPES)
def test_a_damaged_adapter_is_refused_or_the_same(tmp_path: Path, values: ValueType) -> None:
    saved = save_one(tmp_path / "math", values, is_explicit=values == "int8")
    files = {file: file.read_bytes() for file in tmp_path.glob("math/*")}
    rng, same = random.Random(values), 0
    for _ in range(NUM_DAMAGED):
        file = rng.choice(sorted(files))
        file.write_bytes(damaged(files[file], rng))
        for base in (None, BASE):
            if loaded := load_if_sound(tmp_path / "math", base):
                same += 1
                assert is_equal(loaded, saved)
        file.write_bytes(files[file])
    assert 0 < same < NUM_DAMAGED / 2  # only damaged white space gives an equal adapter


@pytest.mark.slow
def test_a_damaged_basis_is_refused(tmp_path: Path) -> None:
    save_one(tmp_path / "math", "bfloat16", is_explicit=True)
    (file,) = (tmp_path / BASES_FOLDER).iterdir()
    content, rng = file.read_bytes(), random.Random(1)
    for _ in range(500):
        changed = damaged(content, rng)
        file.write_bytes(changed)
        with pytest.raises(AdapterFormatError):
            load_adapter(tmp_path / "math")
