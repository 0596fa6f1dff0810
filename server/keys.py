"""`python -m server.keys`: makes a key, shows it once, and writes its hash to the key file of `python -m server --keys FILE`."""

import hashlib
import secrets
import stat
import sys
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Literal

import typer
from filelock import FileLock

from lori.flags import show_version
from lori.printable import printable_lines
from lori.store.files import read_regular, replace_file
from server.access.keys import KEY_PREFIX, MAX_BYTES, KeyFileError, Keys, check_identifier, parse_keys

NUM_BYTES = 32
"""Random bytes of a key. Nobody guesses so many, so a fast hash of the key is safe to store."""
LOCK_S = 60
Role = Literal["tenant", "admin", "monitor"]


def _identifier(value: str | None) -> str | None:
    try:
        return value and check_identifier(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@dataclass(frozen=True, slots=True)
class Entry:
    """A new key, and the fields of its `[[keys]]` table in the key file."""

    key: str
    name: str
    role: Role
    tenant: str | None
    is_first: bool
    """Whether the key is the first of a tenant that the file does not have yet."""

    def toml(self) -> str:
        """Return the tables to append to the file."""
        fields = {"id": self.name} | ({"tenant": self.tenant} if self.tenant else {"role": self.role})
        fields["sha256"] = hashlib.sha256(self.key.encode()).hexdigest()
        lines = [f"[tenants.{self.tenant}]", ""] if self.is_first else []
        return "\n".join([*lines, "[[keys]]", *(f'{name} = "{value}"' for name, value in fields.items()), ""])


def make_key(
    file: Annotated[
        Path | None,
        typer.Argument(help="The key file: made if absent. Without one the entry is printed, too.", show_default=False),
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(callback=_identifier, help="Who sends requests with it.", show_default=False)
    ] = None,
    role: Annotated[
        Role, typer.Option(help="tenant: sends requests; admin: changes adapters and merges, too; monitor: reads /metrics alone.")
    ] = "tenant",
    name: Annotated[
        str | None,
        typer.Option("--id", callback=_identifier, help="What logs call it; such as acme-1 if absent.", show_default=False),
    ] = None,
    _: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Make a key, print it once, and append its hash to FILE. A running server reads FILE again when it changes."""
    if (role == "tenant") != (tenant is not None):
        raise typer.BadParameter("pass --tenant NAME, or else --role admin or --role monitor")
    if file is None:
        entry = _entry(parse_keys(b"", ""), role, tenant, name)
        print(f"{entry.key}\n\n{entry.toml()}", end="")
        return
    entry = append(file, role, tenant, name)
    print(entry.key)
    print(f"{file} has the hash of the key {entry.name!r}; the key itself is shown this once", file=sys.stderr)
    if entry.is_first:
        print(f"the tenant {tenant!r} is new, and may use every adapter: [tenants.{tenant}] says otherwise", file=sys.stderr)


def append(file: Path, role: Role, tenant: str | None, name: str | None) -> Entry:
    """Append a new key to a file, which is whole at any time and keeps its owner. Raises `KeyFileError` or `OSError`."""
    file = file.resolve()  # replaces the link's target, not the link
    with FileLock(file.with_name(f".{file.name}.lock"), timeout=LOCK_S):
        old = file.stat() if file.exists() else None
        content = read_regular(file, MAX_BYTES) if old else b""
        entry = _entry(parse_keys(content, str(file)), role, tenant, name)
        gap = b"" if not content else b"\n" if content.endswith(b"\n") else b"\n\n"
        content += gap + entry.toml().encode()
        parse_keys(content, f"{file} with the new key")
        mode, owner = (stat.S_IMODE(old.st_mode), (old.st_uid, old.st_gid)) if old else (0o600, None)
        replace_file(file, content, mode, owner)
    return entry


def _entry(keys: Keys, role: Role, tenant: str | None, name: str | None) -> Entry:
    used = {caller.key_id for caller in keys.callers.values()}
    name = name or next(free for i in count(1) if (free := f"{tenant or role}-{i}") not in used)
    key = KEY_PREFIX + secrets.token_urlsafe(NUM_BYTES)
    return Entry(key, name, role, tenant, is_first=tenant is not None and tenant not in keys.tenants)


def main() -> int:
    """Run the program and return its exit code: 0, 1 if the file is not sound or cannot be written, 2 for wrong options."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(make_key)
    try:
        app(prog_name="python -m server.keys")
    except KeyFileError as error:
        print("error: " + "\n".join(error.lines), file=sys.stderr)
        return 1
    except OSError as error:
        print(printable_lines(f"error: {error}"), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
