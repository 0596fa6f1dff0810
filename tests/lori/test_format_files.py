"""Files that are no adapter's, or damaged: each is refused, and none is run or read without bounds."""

import json
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors

from lori.config import CONFIG_FILE
from lori.errors import AdapterFormatError
from lori.format import WEIGHTS_FILE, load_adapter
from tests.lori.adapters import make_config, make_modules, save
from tests.lori.forged import Q, Tensors, effect, faults_of, forge, load, load_if_sound, sign, sign_config


def test_a_missing_folder(tmp_path: Path) -> None:
    assert faults_of(tmp_path / "none") == tuple(
        f"{f} cannot be read: No such file or directory" for f in (CONFIG_FILE, WEIGHTS_FILE)
    )


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file(folder: Path, file: str) -> None:
    (folder / file).unlink()
    assert faults_of(folder) == (f"{file} cannot be read: No such file or directory",)


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_folder_in_place_of_a_file(folder: Path, file: str) -> None:
    (folder / file).unlink()
    (folder / file).mkdir()
    assert faults_of(folder) == (f"{file} cannot be read: it is not a regular file",)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}", b'{"base_model_name_or_path": "\\ud800"}'],
    ids=["empty", "cut", "not UTF-8", "deep", "huge number", "half a surrogate"],
)
def test_a_config_that_is_not_json(folder: Path, text: bytes) -> None:
    (folder / CONFIG_FILE).write_bytes(text)
    (fault,) = faults_of(folder)
    assert fault.startswith(f"{CONFIG_FILE}: JSON: Invalid JSON")


def test_a_config_that_is_no_object(folder: Path) -> None:
    (folder / CONFIG_FILE).write_text("[]")
    assert len(faults_of(folder)) == 1


def test_a_peft_lora_adapter_is_refused_as_a_config(folder: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "a/base", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    [fault] = faults_of(folder)
    assert fault.startswith(f"{CONFIG_FILE}: it is a PEFT LoRA: `python -m lori import FOLDER STORE --model a/base` ")


class Payload:
    """Object whose unpickling creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, "adapter_model.bin"])
def test_a_pickle_is_refused_and_not_run(folder: Path, name: str) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(folder / "trace")))
    (fault,) = faults_of(folder)
    assert fault.startswith(WEIGHTS_FILE)
    assert not (folder / "trace").exists()
    pickle.loads((folder / name).read_bytes())  # noqa: S301 - shows that the payload would have worked
    assert (folder / "trace").exists()


def test_a_torch_file_is_refused(folder: Path) -> None:
    torch.save(load_tensors((folder / WEIGHTS_FILE).read_bytes()), folder / WEIGHTS_FILE)
    (fault,) = faults_of(folder)
    assert fault.startswith(f"{WEIGHTS_FILE} is not a safetensors file: ")


def test_truncated_weights(folder: Path) -> None:
    whole = (folder / WEIGHTS_FILE).read_bytes()
    for length in [*range(0, len(whole), 11), len(whole) - 1]:
        (folder / WEIGHTS_FILE).write_bytes(whole[:length])
        (fault,) = faults_of(folder)
        assert fault.startswith(f"{WEIGHTS_FILE} is not a safetensors file: "), length


def test_weights_with_trailing_bytes(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes() + b"\0" * 8)
    assert len(faults_of(folder)) == 1


def test_a_truncated_config(folder: Path) -> None:
    whole = (folder / CONFIG_FILE).read_bytes().rstrip()
    for length in range(0, len(whole), 7):
        (folder / CONFIG_FILE).write_bytes(whole[:length])
        (fault,) = faults_of(folder)
        assert fault.startswith(f"{CONFIG_FILE}: JSON: Invalid JSON"), length


@pytest.mark.parametrize(
    "tensor",
    [
        # Each passes safetensors' own parser. Regression: the conversion to torch raised a KeyError, RuntimeError or TypeError.
        pytest.param({"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}, id="4-bit floats"),
        pytest.param({"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}, id="exponents"),
        pytest.param({"dtype": "U8", "shape": [0, 2**63 - 1, 4], "data_offsets": [0, 0]}, id="strides overflow"),
        pytest.param({"dtype": "U8", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}, id="size overflows"),
    ],
)
def test_a_tensor_that_torch_cannot_hold_is_refused(folder: Path, tensor: dict[str, Any]) -> None:
    header = json.dumps({f"{Q}.mask": tensor}).encode()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(tensor["data_offsets"][1]))
    sign(folder, json.loads((folder / CONFIG_FILE).read_bytes()))
    assert any(fault.startswith((WEIGHTS_FILE, f"{Q}.mask")) for fault in faults_of(folder))


def corruptions(whole: bytes, count: int, rng: random.Random) -> list[bytes]:
    """Return copies of `whole` with one changed byte: half of them by one bit, the others to a random byte."""
    copies = []
    for i in range(count):
        at = rng.randrange(len(whole))
        byte = whole[at] ^ (1 << rng.randrange(8)) if i % 2 else rng.choice([b for b in range(256) if b != whole[at]])
        copies.append(whole[:at] + bytes([byte]) + whole[at + 1 :])
    return copies


@pytest.mark.slow
def test_one_wrong_byte_in_the_weights_is_always_found(folder: Path) -> None:
    for weights in corruptions((folder / WEIGHTS_FILE).read_bytes(), 400, random.Random(1)):
        (folder / WEIGHTS_FILE).write_bytes(weights)
        assert faults_of(folder)


@pytest.mark.slow
def test_one_wrong_byte_in_a_signed_file_gives_an_adapter_or_a_format_error(folder: Path) -> None:
    raw, loaded = json.loads((folder / CONFIG_FILE).read_bytes()), []
    for weights in corruptions((folder / WEIGHTS_FILE).read_bytes(), 400, random.Random(2)):
        (folder / WEIGHTS_FILE).write_bytes(weights)
        sign(folder, raw)
        loaded.append(load_if_sound(folder))
    sound = [adapter for adapter in loaded if adapter]
    assert 0 < len(sound) < 400  # a changed value gives a sound adapter, a changed header does not
    assert all(b.values.isfinite().all() for adapter in sound for b in adapter.modules.values())


@pytest.mark.slow
def test_one_wrong_byte_in_the_config_never_gives_another_adapter(folder: Path) -> None:
    before, loaded = effect(load(folder)), []
    for config in corruptions((folder / CONFIG_FILE).read_bytes(), 600, random.Random(3)):
        (folder / CONFIG_FILE).write_bytes(config)
        loaded.append(load_if_sound(folder))
    sound = [adapter for adapter in loaded if adapter]
    assert 0 < len(sound) < 300  # changes of white space or of a record
    assert all(effect(adapter) == before for adapter in sound)


@pytest.mark.parametrize("key", ["config_digest", "content_digest", "shapes", "basis", "templates", "sparsity"])
def test_a_config_that_lacks_a_field_is_refused(folder: Path, key: str) -> None:
    # Regression: a config without its own digest raised a KeyError.
    raw = json.loads((folder / CONFIG_FILE).read_bytes())
    raw["lori"].pop(key)
    (folder / CONFIG_FILE).write_text(json.dumps(raw))
    assert f"{CONFIG_FILE}: lori.{key}: Field required" in faults_of(folder)


def test_a_folder_of_format_1_is_refused_as_outdated(folder: Path) -> None:
    raw = json.loads((folder / CONFIG_FILE).read_bytes())
    raw["lori"]["format_version"] = 1
    (folder / CONFIG_FILE).write_text(json.dumps(raw))
    assert any("format 1 is not read any more" in fault for fault in faults_of(folder))


@pytest.mark.parametrize("field", ["metrics", "merge_weights", "training", "lora_dropout"])
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_json_lacks_is_refused(folder: Path, field: str, number: str) -> None:
    raw = json.loads((folder / CONFIG_FILE).read_bytes())
    value = float(number)
    changed = {"metrics": {"x": value}, "merge_weights": {"x": [1, value]}, "training": {"deep": [{"x": value}]}}.get(
        field, value
    )
    (raw if field == "lora_dropout" else raw["lori"])[field] = changed
    sign_config(folder, raw)
    assert any(field in fault for fault in faults_of(folder))


def test_an_overlong_mask_is_refused_before_it_is_decoded(folder: Path) -> None:
    # Regression: 20 MB of ones took 2 GB of memory.
    forge(folder, lambda t: t.update({f"{Q}.mask": torch.full((2**20,), 255, dtype=torch.uint8)}))
    assert any("more than any mask of 27 entries" in fault for fault in faults_of(folder))


def test_an_oversized_a_is_not_drawn(tmp_path: Path) -> None:
    # Regression: a file of 3 kB could make the loader draw for hours.
    shapes = {f"layers.{i}.q_proj": (1, 2**24) for i in range(65)}
    config = make_config({"layers.0.q_proj": (1, 4)}, ("q_proj",), rank=1)
    save(tmp_path / "a", config, make_modules({"layers.0.q_proj": (1, 4)}, ("q_proj",), rank=1))

    def grow(t: Tensors) -> None:
        t.update({f"{module}.{part}": t[f"{Q}.{part}"].clone() for module in shapes for part in ("mask", "values")})

    forge(tmp_path / "a", grow, lambda raw: raw["lori"]["shapes"].update(q_proj=[1, 2**24]))
    with pytest.raises(AdapterFormatError, match="A has 1090519040 entries, expected 1073741824 at most"):
        load_adapter(tmp_path / "a")


def test_an_oversized_config_is_not_read(folder: Path) -> None:
    with (folder / CONFIG_FILE).open("ab") as file:
        file.truncate(2**40)
    assert any("it has 1099511627776 bytes" in fault for fault in faults_of(folder))
