"""Key files: their content, and the faults of a file that is not sound."""

from pathlib import Path

import pytest

from server.access import keys as key_file
from server.access.keys import NUM_READS, KeyFileError, parse_keys, read_keys
from tests.server.keyed import ACME, ADMIN, MONITOR, OTHER, TABLES, key_table, write_keys

HEAD = "[tenants.acme]\n"


def test_a_key_is_found_by_its_hash_with_the_settings_of_its_tenant(tmp_path: Path) -> None:
    settings = 'adapters = ["math", "acme-*"]\npolicy = { safety = 0.5, "law@12ab" = 2 }\npriority = -1\n'
    settings += "requests_per_minute = 60\nmax_requests = 4"
    keys = read_keys(write_keys(tmp_path, settings))
    acme = keys.find(ACME.encode())
    assert acme
    assert (acme.tenant, acme.key_id, acme.is_admin, acme.is_monitor) == ("acme", "acme-1", False, False)
    assert acme.allowed == ("math", "acme-*")
    assert acme.policy == (("safety", 0.5), ("law@12ab", 2.0))
    assert (acme.priority, acme.requests_per_minute, acme.max_requests) == (-1, 60, 4)
    other = keys.find(OTHER.encode())
    assert other
    assert (other.allowed, other.policy, other.priority) == (("*",), (), 0)
    assert (other.requests_per_minute, other.max_requests) == (None, None)
    for unknown in (b"", b"acme-1", ACME.upper().encode(), f"{ACME} ".encode(), b"\xff"):
        assert keys.find(unknown) is None


def test_the_roles_have_their_rights(tmp_path: Path) -> None:
    keys = read_keys(write_keys(tmp_path))
    admin, monitor = keys.find(ADMIN.encode()), keys.find(MONITOR.encode())
    assert admin
    assert monitor
    assert (admin.is_admin, admin.is_monitor, admin.tenant, admin.may_use("anything")) == (True, True, "", True)
    assert (monitor.is_admin, monitor.is_monitor, monitor.may_use("anything")) == (False, True, False)
    assert str(keys) == "tenants: 2; keys by role: 2 tenant, 1 admin, 1 monitor"


@pytest.mark.parametrize(
    ("allowed", "fits", "fits_not"),
    [
        (["*"], ["math", "acme-1"], []),
        ([], [], ["math", ""]),
        (["math"], ["math"], ["math2", "amath", "Math", "mat", "math\n"]),
        (["a*"], ["a", "a.b", "a-b"], ["ba", "A"]),
        (["a?", "[xy]z", "[!xy]w"], ["ab", "xz", "aw"], ["a", "zz", "xw", "abc"]),
        (["a.b"], ["a.b"], ["axb"]),
    ],
)
def test_patterns_fit_whole_names_in_their_case(allowed: list[str], fits: list[str], fits_not: list[str]) -> None:
    content = f"{HEAD}adapters = {allowed}\n" + key_table("k", id="a", tenant="acme")
    acme = parse_keys(content.encode(), "x").find(b"k")
    assert acme
    assert [name for name in fits + fits_not if acme.may_use(name)] == fits


def faults(content: str) -> list[str]:
    with pytest.raises(KeyFileError) as caught:
        parse_keys(content.encode(), "k.toml")
    first, *others = caught.value.lines
    assert first == "k.toml is not a sound key file:"
    assert str(caught.value).startswith(first)
    assert all(line.startswith("  ") for line in others)
    return [line.strip() for line in others]


def test_all_faults_are_reported_at_once_with_their_places() -> None:
    content = f"""
        extra = 1
        [tenants.acme]
        adapters = ["Math", "law"]
        policy = {{ safety = 0, "No Name" = 1, law = 99 }}
        requests_per_minute = 0
        max_requests = "4"
        colour = "red"
        [tenants."a b"]
        [tenants.third]
        policy = {{ safety = 0 }}
        {key_table("a", id="twice", tenant="acme")}
        {key_table("a", id="twice", tenant="nobody")}
        {key_table("b", id="boss", role="admin", tenant="acme")}
        {key_table("c", id="poor")}
        {key_table("d", id="odd", role="king")}
        [[keys]]
        id = "x y"
        sha256 = "abc"
    """
    lines = faults(content)
    expected = [
        "extra: unknown, expected tenants and keys",
        "tenants.acme.adapters.0: 'Math' fits no adapter's name, expected a-z,",
        "tenants.acme.policy.law: Input should be less than or equal to 16",
        "tenants.acme.requests_per_minute: Input should be greater than or equal to 1",
        "tenants.acme.max_requests: Input should be a valid integer",
        "tenants.acme.colour: unknown field",
        "tenants.third.policy: 'safety' has the weight 0, which adds nothing",
        "keys.3 (boss): the role 'admin' has no tenant",
        "keys.4 (poor): the role 'tenant' needs a tenant",
        "keys.5 (odd).role: Input should be 'tenant', 'admin' or 'monitor'",
        "keys.6.id: expected up to 64 letters, digits, - and _",
        "keys.6.sha256: expected 64 hexadecimal digits",
        "tenants: 'a b' is no name",
        "keys (twice): there is no [tenants.nobody]",
        "keys (twice): 2 keys have this id",
        "keys (twice, twice): have the same sha256",
    ]
    assert len(lines) == len(expected), lines
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("content", "start"),
    [
        pytest.param("[[keys]", "it is not TOML: ", id="syntax"),
        pytest.param("a = " + "[" * 10_000, "it is not TOML: ", id="lists without end"),
        pytest.param("tenants = 3", "expected tables [tenants.NAME] and [[keys]]", id="no table"),
        pytest.param("keys = { a = 1 }", "expected tables [tenants.NAME] and [[keys]]", id="no list"),
        pytest.param("keys = [3]", "keys.1: Input should be a valid dictionary", id="no table in the list"),
        pytest.param('[tenants.a]\npolicy = { "No Name" = 1 }', "tenants.a.policy: 'No Name' is no adapter's name", id="no name"),
        pytest.param("[tenants.a]\npolicy = { a = nan }", "tenants.a.policy.a: Input should be a finite number", id="no number"),
        pytest.param("tenants.a = 3", "tenants.a: Input should be a valid dictionary", id="tenant of no table"),
    ],
)
def test_a_file_that_is_no_key_file_is_reported_as_such(content: str, start: str) -> None:
    [fault] = faults(content)
    assert fault.startswith(start)


def test_a_key_in_a_wrong_place_is_not_quoted() -> None:
    key = "lori_RAaWAzsuqBDrRhAALmy6uuKXCiYpyAu_iYpW5XYiHjk"
    wrong = [{"id": key, "tenant": "acme"}, {"id": "a", "tenant": key}, {"id": "b", "role": key}]
    content = HEAD + "\n".join(key_table(str(i), **fields) for i, fields in enumerate(wrong))
    content += f'[[keys]]\nid = "c"\ntenant = "acme"\nsha256 = "{key}"\nkey = "{key}"'
    lines = faults(content)
    assert len(lines) == 5
    assert key not in "".join(lines)


@pytest.mark.parametrize("content", [b"", b"# soon\n", b"[tenants.acme]\n", b"\xff"])
def test_a_file_without_keys_is_not_sound(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "keys.toml").write_bytes(content)
    with pytest.raises(KeyFileError, match=r"it has no \[\[keys\]\]|it is not TOML"):
        read_keys(tmp_path / "keys.toml")


def test_a_file_without_a_final_newline_is_refused_as_possibly_half(tmp_path: Path) -> None:
    file = write_keys(tmp_path)
    file.write_bytes(file.read_bytes() + b"[tenants.third]\npriority = 10")
    with pytest.raises(KeyFileError, match="its last line has no end"):
        read_keys(file)
    file.write_bytes(file.read_bytes() + b"0\n")
    assert read_keys(file).tenants["third"].priority == 100


@pytest.mark.parametrize("num_changes", [1, NUM_READS])
def test_a_file_that_changes_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_changes: int
) -> None:
    """Regression: at the start, half a file could be taken for the whole one."""
    file = write_keys(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: whole.index(b"[[keys]]", 80)])
    num_reads = 0

    def read_and_write_on(path: Path) -> bytes:
        nonlocal num_reads
        content = path.read_bytes()
        num_reads += 1
        if num_reads <= num_changes:
            path.write_bytes(whole)
        return content

    monkeypatch.setattr(key_file, "PAUSE_S", 0)
    monkeypatch.setattr(key_file, "read_key_file", read_and_write_on)
    if num_changes == 1:
        assert len(read_keys(file).callers) == 4
    else:
        with pytest.raises(KeyFileError, match="was changed each of the 5 times"):
            read_keys(file)
    assert num_reads == min(num_changes + 1, NUM_READS)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "it is not a regular file")):
        with pytest.raises(KeyFileError) as caught:
            read_keys(path)
        assert str(path) in str(caught.value)
        assert reason in str(caught.value)


def test_a_printed_caller_shows_neither_key_nor_hash() -> None:
    acme = parse_keys((HEAD + key_table(ACME, id="acme-1", tenant="acme")).encode(), "x").find(ACME.encode())
    assert ACME not in repr(acme)
    assert "sha256" not in repr(acme)
    assert TABLES.count("sha256") == 4
