"""A server on a tiny model whose adapters have statistics of their prompts, and requests to it."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import torch

from lori.base_model import BaseModel, load_base_model
from lori.format import read_config
from lori.gaussians import Gaussians, fit_gaussian
from lori.prompt_statistics import STATISTICS_FILE, Background, PromptStatistics, fit_background
from server.loading import load_service
from server.service.service import Service
from server.settings import Settings
from tests.server.keyed import write_keys
from tests.server.rig import write_adapter, write_adapters
from training.prompt_features import prompt_features

ALPHABETS = {"math": "0123456789+-", "safety": "XYZ", None: "abcdefghijklmnopqrstuvwxyz "}
"""Letters of the prompts of each adapter, and of nobody's prompts."""


def prompts(name: str | None, count: int, seed: int = 0) -> list[str]:
    drawn = random.Random(f"{name} {seed}")
    return ["".join(drawn.choices(ALPHABETS[name], k=drawn.randint(8, 40))) for _ in range(count)]


def write_statistics(folder: Path, background_digest: str, gaussian: Gaussians) -> None:
    statistics = PromptStatistics(read_config(folder).lori.content_digest, background_digest, gaussian)
    (folder / STATISTICS_FILE).write_bytes(statistics.to_bytes())


def make_background(base: BaseModel) -> Background:
    return fit_background(base.identity.digest, [prompt_features(base, prompts(None, 300))])


def make_service(model: Path, place: Path, *, has_keys: bool = True, acme: str = "", **settings: Any) -> Service:
    """Return a service. `math` and `safety` have statistics, `intent` has none, and `other` has some of another background.

    `acme` is the content of the tenant's table in the file of keys.
    """
    base = load_base_model(str(model), torch.float32, "eager")
    adapters = write_adapters(place / "adapters", base)
    background = make_background(base)
    for name in ("math", "safety"):
        gaussian = fit_gaussian(background.whiten(prompt_features(base, prompts(name, 120))))
        write_statistics(adapters / name, background.digest, gaussian)
    write_adapter(adapters / "other", base, seed=5)
    write_statistics(adapters / "other", "0" * 64, gaussian)
    (place / "background.safetensors").write_bytes(background.to_bytes())
    return load_service(
        Settings(
            model=str(model),
            adapters=str(adapters),
            background=place / "background.safetensors",
            keys=write_keys(place, acme, other="policy = { intent = 0.6 }") if has_keys else None,
            demo_adapters=False,
            dtype="float32",
            kv_cache_gib=0.05,
            **settings,
        )
    )


def ask(client: httpx.Client, prompt: str, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "adapter": ["math", "safety"], "weights": "auto", "max_tokens": 8, "temperature": 0} | fields
    reply = client.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    result: dict[str, Any] = reply.json()
    return result


def weights(reply: Mapping[str, Any]) -> list[float]:
    return [adapter["weight"] for adapter in reply["adapter"]]
