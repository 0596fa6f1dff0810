"""The full names of a model's modules, such as `model.layers.3.self_attn.q_proj`, and what their parts say."""


def last(module: str) -> str:
    """Returns the projection: `q_proj`."""
    return module.rpartition(".")[2]


def layer(module: str) -> str:
    """Returns all up to the first number: `model.layers.3`; nothing where there is none."""
    parts = module.split(".")
    return ".".join(parts[: _end_of_layer(parts)])


def block(module: str) -> str:
    """Returns what lies between the layer and the projection: `self_attn`."""
    parts = module.split(".")
    return ".".join(parts[_end_of_layer(parts) : -1])


def natural(module: str) -> list[tuple[bool, int, str]]:
    """Returns a key that puts `layers.2` before `layers.10`."""
    return [(part.isdecimal(), len(part) if part.isdecimal() else 0, part) for part in module.split(".")]


def _end_of_layer(parts: list[str]) -> int:
    return next((i + 1 for i, part in enumerate(parts) if part.isdecimal()), 0)
