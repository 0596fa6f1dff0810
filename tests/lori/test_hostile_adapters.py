"""Adapters of a hostile writer: damaged or invented content with right digests, so that it reaches the parser."""

import random
import re
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from lori import rice
from lori.adapter import Adapter
from lori.basis import Explicit, Seeded
from lori.config import CONFIG_FILE, AdapterConfig, SeededConfig, config_digest
from lori.errors import AdapterFormatError
from lori.format import WEIGHTS_FILE, BasisOf, content_digest, parse_adapter
from lori.identity import BaseIdentity
from lori.sparse import VALUE_TYPES, ValueType, stored_dtype
from lori.store.bases import basis_bytes, load_basis, parse_basis
from lori.weights import parts, weight_bytes
from tests.lori.adapters import BASE, RANK, SHAPES, make_config, make_modules, save, targeted

NUM_MUTANTS = 400
"""Number of mutants for each type of values and each kind of mutation."""
MAX_MORE_BYTES = 512 * 2**20
"""Address space that the process may add to its current one. The adapters have 4 KB."""
MODULES = [*targeted(SHAPES)]
NUMBERS = (
    b"0",
    b"-1",
    b"1",
    b"4096",
    b"4097",
    b"70000",
    b"16777217",
    b"1e5",
    b"1e400",
    b"NaN",
    b"9" * 30,
    b"null",
    b'""',
    b"[]",
    b"{}",
)
"""Replacements for a number in a config."""
Files = Mapping[str, bytes]
Tensors = dict[str, torch.Tensor]


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Context manager: allocations beyond `MAX_MORE_BYTES` of additional memory fail, if the system supports it (Linux)."""
    if sys.platform != "linux":
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    num_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes + MAX_MORE_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def with_digest(config: bytes, field: str, digest: str) -> bytes:
    """Return `config` with another digest in `field`, or unchanged if the field has no digest."""
    return re.sub(rb'("%s"\s*:\s*")[0-9a-f]{64}"' % field.encode(), rb'\g<1>%s"' % digest.encode(), config)


def resealed(files: Files) -> Files:
    """Return `files` with a config that has the digests of this content. Return them unchanged if the config is invalid."""
    content, weights = files[CONFIG_FILE], files[WEIGHTS_FILE]
    try:
        config = AdapterConfig.model_validate_json(content)
        content = with_digest(content, "content_digest", content_digest(weights, config))
        if digest := drawn_digest(config):
            content = with_digest(content, "basis_digest", digest)
        return {CONFIG_FILE: with_digest(content, "config_digest", config_digest(content)), WEIGHTS_FILE: weights}
    except ValidationError:
        return files


def drawn_digest(config: AdapterConfig) -> str | None:
    """Return the digest of the A that `config` names, over the test's modules; None if drawing it would take long."""
    shapes = {m: (config.rank_of(m), shape[1]) for m in MODULES if (shape := config.shape_of(m)) and config.is_target(m)}
    if not isinstance(config.lori.basis, SeededConfig) or sum(r * n for r, n in shapes.values()) > 10_000:
        return None
    return config.lori.basis.basis().digest(shapes)


# --- mutations


def bytes_changed(content: bytes, rng: random.Random) -> bytes:
    """Return `content` with one to three places changed, deleted or repeated."""
    for _ in range(rng.randint(1, 3)):
        begin = rng.randrange(len(content))
        end = min(len(content), begin + rng.choice((1, 1, 1, 8, 64)))
        new = rng.choice(
            (b"", rng.randbytes(end - begin), content[begin:end] * 2, bytes([content[begin] ^ (1 << rng.randrange(8))]))
        )
        content = content[:begin] + new + content[end:]
        if not content:
            break
    return content


def number_changed(content: bytes, rng: random.Random) -> bytes:
    """Return a config in which one or two numbers are replaced."""
    for _ in range(rng.randint(1, 2)):
        match = rng.choice([*re.finditer(rb"(?<=[:\[\s,])-?\d+(\.\d+)?(?=[,\s\]])", content)])
        content = content[: match.start()] + rng.choice((*NUMBERS, b"%d" % rng.randrange(64))) + content[match.end() :]
    return content


def header_changed(content: bytes, rng: random.Random) -> bytes:
    """Return safetensors with a changed header. The length field matches it."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = rng.choice((bytes_changed, number_changed))(content[8:end], rng)
    return len(header).to_bytes(8, "little") + header + content[end:]


def data_changed(content: bytes, rng: random.Random) -> bytes:
    """Return safetensors with one to three changed bytes after the header."""
    changed, begin = bytearray(content), 8 + int.from_bytes(content[:8], "little")
    for _ in range(rng.randint(1, 3)):
        changed[rng.randrange(begin, len(content))] = rng.randrange(256)
    return bytes(changed)


def tensors_changed(content: bytes, rng: random.Random) -> bytes:
    """Return valid safetensors with one to three changed tensors."""
    tensors = load_tensors(content)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(sorted(tensors))
        rng.choice(TENSOR_CHANGES)(tensors, name, rng)
        if not tensors:
            break
    return save_tensors(tensors)


def _reshaped(tensors: Tensors, name: str, rng: random.Random) -> None:
    old = tensors[name]
    tensors[name] = rng.choice((old[:-1], old[1:], torch.cat([old, old]), old[None], old[:0], old.flip(0))).contiguous()


def _retyped(tensors: Tensors, name: str, rng: random.Random) -> None:
    dtype = rng.choice((torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.bool))
    tensors[name] = tensors[name].to(dtype)


def _renamed(tensors: Tensors, name: str, rng: random.Random) -> None:
    tensors[rng.choice((name + "s", "x", name.partition(".")[2], rng.choice(sorted(tensors))))] = tensors.pop(name)


def _one_changed(tensors: Tensors, name: str, rng: random.Random) -> None:
    raw = tensors[name].clone().view(torch.uint8)
    if len(raw := raw.flatten()):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
        tensors[name] = raw.view(tensors[name].dtype)


def _special(tensors: Tensors, name: str, rng: random.Random) -> None:
    if tensors[name].is_floating_point() and tensors[name].numel():
        flat = tensors[name].clone().flatten()
        flat[rng.randrange(len(flat))] = rng.choice((float("nan"), float("inf"), -0.0, 1e-40, 3e38))
        tensors[name] = flat


def _left_out(tensors: Tensors, name: str, _: random.Random) -> None:
    del tensors[name]


TENSOR_CHANGES: tuple[Callable[[Tensors, str, random.Random], None], ...] = (
    _reshaped, _retyped, _renamed, _one_changed, _one_changed, _one_changed, _special, _left_out,
)  # fmt: skip
MUTATIONS: dict[str, tuple[str, Callable[[bytes, random.Random], bytes], float]] = {
    "bytes of the config": (CONFIG_FILE, bytes_changed, 0.1),
    "numbers of the config": (CONFIG_FILE, number_changed, 0.5),
    "header of the weights": (WEIGHTS_FILE, header_changed, 0.01),
    "data of the weights": (WEIGHTS_FILE, data_changed, 0.15),
    "tensors": (WEIGHTS_FILE, tensors_changed, 0.7),
}
"""By name of the mutation: the file, the function, and the minimum fraction of mutants that are refused for their meaning."""
SYNTAX = re.compile(rf"{CONFIG_FILE}: JSON|{WEIGHTS_FILE} is not a safetensors file")
DIGEST = re.compile(r"content digest is|its digest is")


# --- permitted outcomes


def check_faults(faults: Sequence[str], tensors: Tensors | None, value_type: ValueType) -> None:
    """Check that a refusal gives reasons, and names every wrong tensor of `tensors`, if these could be read."""
    assert faults
    assert all(faults)
    if tensors is None:
        return
    wanted = {f"{module}.{part}" for module in MODULES for part in parts(value_type)}
    assert {f"{name}: missing" for name in wanted - tensors.keys()} <= {*faults}
    assert {f"{name}: unknown tensor" for name in tensors.keys() - wanted} <= {*faults}
    dtypes = {"mask": torch.uint8, "values": stored_dtype(value_type), "scales": torch.bfloat16}
    for module in MODULES:
        own = {part: tensors[name] for part in parts(value_type) if (name := f"{module}.{part}") in tensors}
        for part in own if len(own) == len(parts(value_type)) else ():
            if own[part].dtype != dtypes[part] or own[part].dim() != 1:
                assert any(fault.startswith(f"{module}.{part}: ") for fault in faults), (module, part, faults)


def check_is_what_it_says(adapter: Adapter, files: Files, value_type: ValueType) -> None:
    """Check an accepted adapter against its files, read independently, with the reference decoder of masks."""
    assert adapter.config == AdapterConfig.model_validate_json(files[CONFIG_FILE])
    tensors = load_tensors(files[WEIGHTS_FILE])
    assert tensors.keys() == {f"{module}.{part}" for module in adapter.modules for part in parts(value_type)}
    for module, b in adapter.modules.items():
        values = tensors[f"{module}.values"]
        assert b.indices.tolist() == rice.decode(tensors[f"{module}.mask"].numpy(), b.num_entries, len(values)).tolist()
        assert b.values.isfinite().all()
        if value_type == "int8":
            assert torch.equal(b.values, values.float() * tensors[f"{module}.scales"].float()[b.rows])
        else:
            assert b.values.dtype == stored_dtype(value_type)
            assert torch.equal(b.values.view(torch.uint8), values.view(torch.uint8))
        a = adapter.basis.draw(module, b.shape[1], adapter.config.lori.shapes[module.rpartition(".")[2]][1])
        assert a.isfinite().all()
    again = load_tensors(weight_bytes(adapter.modules, value_type))
    assert all(torch.equal(again[name].view(torch.uint8), tensors[name].view(torch.uint8)) for name in tensors), "not canonical"


def outcome(files: Files, basis_of: BasisOf, base: BaseIdentity | None) -> Adapter | AdapterFormatError:
    """Return the adapter or the refusal that reading `files` gives. Any other error fails the test."""
    try:
        return parse_adapter("math", files, basis_of, base)
    except AdapterFormatError as error:
        return error


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_an_adapter_with_right_digests_is_refused_or_matches_its_files(
    tmp_path: Path, value_type: ValueType, mutation: str
) -> None:
    file, mutate, least_share = MUTATIONS[mutation]
    explicit = Explicit.from_tensors({name: Seeded(9).draw(name, RANK, n) for name, (_, n) in targeted(SHAPES).items()})
    config = make_config(values=value_type, metrics={"loss": 1.25}, training={"steps": 3}, basis=Seeded(9))
    save(tmp_path / "math", config, make_modules(density=0.15), explicit if value_type == "int8" else None)
    sound = {name: (tmp_path / "math" / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    rng, counts = random.Random(f"{value_type} {mutation}"), Counter[str]()
    with bounded_memory():
        for _ in range(NUM_MUTANTS):
            mutant = resealed({**sound, file: mutate(sound[file], rng)})
            for base in (None, BASE):
                result = outcome(mutant, partial(load_basis, tmp_path), base)
                if isinstance(result, Adapter):
                    counts["accepted"] += 1
                    check_is_what_it_says(result, mutant, value_type)
                    continue
                is_tensors = mutation == "tensors" and base is not None
                check_faults(result.faults, load_tensors(mutant[WEIGHTS_FILE]) if is_tensors else None, value_type)
                kinds = ["syntax" if SYNTAX.match(f) else "digest" if DIGEST.search(f) else "meaning" for f in result.faults]
                counts.update({*kinds})
    assert counts["digest"] == 0, "a mutant was refused for its digests, which are right"
    assert counts["meaning"] > least_share * 2 * NUM_MUTANTS
    assert counts["accepted"] > 0 or mutate is header_changed


@pytest.mark.slow
@pytest.mark.parametrize("mutate", [header_changed, data_changed, tensors_changed])
def test_an_adapter_on_a_hostile_basis_is_refused_or_matches_the_basis_file(
    tmp_path: Path, mutate: Callable[[bytes, random.Random], bytes]
) -> None:
    explicit = Explicit.from_tensors({name: Seeded(9).draw(name, RANK, n) for name, (_, n) in targeted(SHAPES).items()})
    save(tmp_path / "math", make_config(basis=Seeded(9)), make_modules(), explicit)
    files = {name: (tmp_path / "math" / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    content, rng, counts = basis_bytes(explicit), random.Random(mutate.__name__), Counter[str]()
    with bounded_memory():
        for _ in range(NUM_MUTANTS):
            changed = mutate(content, rng)
            mutant = resealed_on(files, explicit, changed)
            result = outcome(mutant, lambda digest, changed=changed: parse_basis("its file", changed, digest), BASE)
            if isinstance(result, Adapter):
                counts["accepted"] += 1
                tensors = load_tensors(changed)
                assert all(tensors[module].isfinite().all() for module in result.modules)
                for module, b in result.modules.items():
                    drawn = result.basis.draw(module, b.shape[1], SHAPES[module][1])
                    assert torch.equal(drawn[: len(tensors[module])], tensors[module].float()[: b.shape[1]])
                continue
            check_faults(result.faults, None, "bfloat16")
            counts.update({"syntax" if "not a safetensors" in fault else "meaning" for fault in result.faults})
    assert counts["syntax" if mutate is header_changed else "meaning"] > 0
    assert counts["accepted"] > 0


def resealed_on(files: Files, explicit: Explicit, changed: bytes) -> Files:
    """Return `files`, which are on `explicit`, with the digests of the basis `changed`, or unchanged if that is no basis."""
    try:
        basis = Explicit.from_tensors(load_tensors(changed))
        drawn = basis.digest({name: (RANK, n) for name, (_, n) in targeted(SHAPES).items()})
    except (SafetensorError, KeyError, RuntimeError, TypeError, IndexError):
        return files
    config = files[CONFIG_FILE].replace(explicit.content_digest.encode(), basis.content_digest.encode())
    return resealed({**files, CONFIG_FILE: with_digest(config, "basis_digest", drawn)})


def test_a_basis_under_the_name_of_another_is_refused() -> None:
    """Missing or additional modules may not matter to the adapter that is loaded first, but to the next one on this basis."""
    tensors = {name: Seeded(9).draw(name, RANK, n) for name, (_, n) in targeted(SHAPES).items()}
    other = Explicit.from_tensors(tensors | {"layers.9.q_proj": torch.ones(RANK, 5)})
    with pytest.raises(AdapterFormatError, match=f"its basis has the digest {other.content_digest}, expected "):
        parse_basis("its file", basis_bytes(other), Explicit.from_tensors(tensors).content_digest)
