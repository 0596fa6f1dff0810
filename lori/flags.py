"""How a program says what is wrong with its flags."""

from pydantic import ValidationError


def flag_faults(error: ValidationError) -> str:
    """Returns every fault of a settings class as its flags' faults, in one line."""
    faults = [("-".join(map(str, e["loc"])).replace("_", "-"), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
    return "; ".join(f"--{flag}: {message}" if flag else message for flag, message in faults)
