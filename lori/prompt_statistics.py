"""Statistics of the prompts that an adapter is for, and of prompts that are no adapter's.

The frozen base alone decides: its first layers read the prompt's last message (`ProbedPrompt`), and the features z of the prompt
are a fixed random projection of what the next layer's attention reads. An adapter's statistics are a Gaussian of z for each form
of its prompts. The background has Gaussians of everything else: a prompt that does not fit an adapter clearly better is left to
the base.

All Gaussians are in the space in which the background's covariance is the identity. Shapes: F features, N width of the base, P
prompts.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import lgamma, log, log1p, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lori.errors import AdapterError, AdapterFormatError, TemplateError
from lori.gaussians import (
    GAUSSIAN_NAMES,
    MAX_MAGNITUDE,
    NUM_AXES,
    REFUSED_NORM,
    Array,
    Gaussians,
    as_float32,
    fit_gaussian,
    joined,
    logsumexp,
)
from lori.identity import BaseIdentity
from lori.names import NUM_VERSION_DIGITS
from lori.printable import printable
from lori.template import Message, render_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATISTICS_FILE = "prompt_statistics.safetensors"
MAX_STATISTICS_BYTES = 1 << 20
NUM_PROJECTED, PROJECTION_KEY = 96, 2504_07448
"""Rows of the random projection, and the key of its random numbers."""
NUM_FEATURES = 2 * NUM_PROJECTED
"""The projected mean of the content's tokens, and the projected last token."""
FREEDOM = 8
"""Degrees of freedom of the background's heavy-tailed distribution."""
MAX_CONTENT_CHARACTERS, MAX_CONTENT_TOKENS = 8192, 512
"""Characters of the last message that are tokenized, and tokens of it that are read, from its end."""
MAX_PROBED_TOKENS = 1024
"""Tokens that are read together with those of the chat template, from their end."""
SENTINEL = "\ue000"
"""A character without a meaning or a case. Templates write it as they write a message's content."""
MAX_GAUSSIANS = 64
"""Maximum number of forms of an adapter's prompts, and of groups in a background."""
NUM_ORIGINAL, LOG_ODDS_KEY = "num_original", "log_odds"
"""Optional keys in the metadata of a background."""
LOG_ODDS = -7.0
"""A background's `log_odds` if none are given. With 0, many prompts that fit no adapter go to one."""
MIN_LOG_ODDS = -100.0
"""Least `log_odds`. The greatest is 0."""
BACKGROUNDS = Path(__file__).parent / "backgrounds"
"""The backgrounds that come with this package, by the base's digest."""
PROBED_LAYERS_DIVISOR = 5
"""The base's first layers compute the features: their number divided by this."""

Tensor = npt.NDArray[Any]


def num_probe_layers(num_layers: int) -> int:
    """Return how many of a base's layers compute the features: a fifth, and at least one."""
    return max(1, num_layers // PROBED_LAYERS_DIVISOR)


def projection_matrix(num_inputs: int) -> Array:
    """Return the fixed random projection (NUM_PROJECTED, N) of the features, uniform in ±1/sqrt(N)."""
    stream = np.random.Philox(key=PROJECTION_KEY)  # which NumPy promises not to change
    bits = stream.random_raw(NUM_PROJECTED * num_inputs)
    unit = (bits >> 11).astype(np.float64) * 2.0**-52 - 1
    return unit.reshape(NUM_PROJECTED, num_inputs) / sqrt(num_inputs)


@dataclass(frozen=True, slots=True)
class ProbedPrompt:
    """The tokens from which a prompt's features are computed: its last user message alone, in the base's chat template.

    So earlier turns and a system prompt do not change the features, nor does the template of the request.
    """

    ids: tuple[int, ...]
    start: int
    stop: int
    """The content's tokens are [start, stop)."""


def probed_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str | Sequence[Message]) -> ProbedPrompt:
    """Return the tokens for the features of `prompt`. Of a long message the end is read.

    A base without a chat template reads the message as it stands. If the template changes a message in an unknown way, or if the
    message is empty, the whole text counts as its content. Raises `TemplateError` if the chat template refuses the message, and
    if there is no token.
    """
    content = (prompt if isinstance(prompt, str) else _last_content(prompt))[-MAX_CONTENT_CHARACTERS:]
    text, first, end = content, 0, len(content)
    if tokenizer.chat_template:
        text = _as_message(tokenizer, content)
        first, end = _content_span(text, _as_message(tokenizer, SENTINEL))
    # `encode_batch` releases the GIL, `encode` does not.
    [encoding] = tokenizer.backend_tokenizer.encode_batch([text], add_special_tokens=not tokenizer.chat_template)
    # A token may hold the content's end and the template's line break.
    inside = [i for i, (start, stop) in enumerate(encoding.offsets) if start < end and stop > first]
    start, stop = (inside[0], inside[-1] + 1) if inside else (0, len(encoding.ids))
    return _bounded(encoding.ids, start, stop)


def _last_content(messages: Sequence[Message]) -> str:
    users = [message for message in messages if message.role == "user"]
    return (users or messages)[-1].content


def _as_message(tokenizer: "PreTrainedTokenizerBase", content: str) -> str:
    return render_prompt(tokenizer, [Message(role="user", content=content)], "chat")


def _content_span(text: str, pattern: str) -> tuple[int, int]:
    """Return the span of the content in `text`; `pattern` is the text of the content `SENTINEL`."""
    prefix, mark, _ = pattern.partition(SENTINEL)
    suffix = pattern.rpartition(SENTINEL)[2]  # the content may be repeated
    span = len(prefix), len(text) - len(suffix)
    is_known = bool(mark) and span[0] <= span[1] and text.startswith(prefix) and text.endswith(suffix)
    return span if is_known else (0, len(text))


def _bounded(ids: Sequence[int], start: int, stop: int) -> ProbedPrompt:
    # First the content's beginning is left out, then the template's.
    if not ids:
        raise TemplateError("the message has no token under the base's chat template")
    cut = max(0, stop - start - MAX_CONTENT_TOKENS)
    ids, stop = [*ids[:start], *ids[start + cut :]], stop - cut
    excess = max(0, len(ids) - MAX_PROBED_TOKENS)
    start, stop = max(0, start - excess), stop - excess
    if stop <= start:  # the template writes very much after the content
        start, stop = 0, MAX_PROBED_TOKENS
    return ProbedPrompt(tuple(ids[excess:]), start, stop)


def project(x: Array, prompt: ProbedPrompt, projection: Array) -> Array:
    """Return the features (F,) of a prompt: the mean of its content's rows in x (T, N), and the last row, both projected."""
    return np.concatenate([projection @ x[prompt.start : prompt.stop].mean(0), projection @ x[-1]])


@dataclass(frozen=True, eq=False)
class Background:
    """Prompts that are no adapter's: the whitening that all statistics use, and Gaussians of ordinary prompts."""

    base_digest: str
    mean: npt.NDArray[np.float32]
    """(F,)"""
    whitening: npt.NDArray[np.float32]
    """(F, F): (z - mean) @ whitening has the identity as its covariance over all prompts of the background."""
    gaussians: Gaussians
    num_original: int = 0
    """Number of Gaussians of the background that this one extends, which come first; 0 if it extends none."""
    log_odds: float = LOG_ODDS
    """Logarithm of the ratio of an adapter's prior probability to the base's."""

    @cached_property
    def digest(self) -> str:
        """The sha256 (hex) of the content."""
        return _digest(self._tensors, self._header)

    @cached_property
    def original_digest(self) -> str:
        """The digest of the background that this one extends, or of this one if it extends none, whatever the prior.

        Statistics name it. They depend on `mean` and `whitening` only, so they hold for all backgrounds that extend one.
        """
        count = self.num_original or len(self.gaussians.means)
        return replace(self, gaussians=self.gaussians.first(count), num_original=0, log_odds=LOG_ODDS).digest

    def extended(self, groups: Sequence[Array]) -> "Background":
        """Return this background with a Gaussian more for each of `groups` of prompts with features (P, F)."""
        parts = [self.gaussians, *(fit_gaussian(self.whiten(group)) for group in groups)]
        return replace(self, gaussians=joined(parts), num_original=self.num_original or len(self.gaussians.means))

    def whiten(self, z: Array) -> Array:
        """Return features (…, F) in the space of the Gaussians."""
        whitened: Array = (z - self.mean) @ self._whitening
        return whitened

    @cached_property
    def _whitening(self) -> Array:
        return self.whitening.astype(np.float64)

    def log_likelihood(self, z: Array, by_gaussian: Sequence[float]) -> float:
        """Return the log-likelihood of z (F,), whitened, without the term that all densities here share.

        `by_gaussian` has the log-likelihood under each of the C Gaussians.
        In equal parts with the Gaussians there is Student's t distribution of all prompts together, with `FREEDOM` degrees of
        freedom. It has heavy tails, so that a prompt unlike all others is nobody's.
        """
        scale = (FREEDOM - 2) / FREEDOM  # with this scale the covariance is the identity
        distance, both = float(z @ z) / scale, (FREEDOM + len(z)) / 2
        wide = lgamma(both) - lgamma(FREEDOM / 2) - len(z) / 2 * log(FREEDOM * scale / 2) - both * log1p(distance / FREEDOM)
        return logsumexp([*by_gaussian, wide]) - log(len(by_gaussian) + 1)

    @property
    def _header(self) -> dict[str, str]:
        header = {"base": self.base_digest}
        if self.num_original:
            header[NUM_ORIGINAL] = str(self.num_original)
        if self.log_odds != LOG_ODDS:
            header[LOG_ODDS_KEY] = repr(self.log_odds)
        return header

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "whitening": self.whitening, **_tensors_of(self.gaussians)}

    def to_bytes(self) -> bytes:
        """Return the content of the background's file."""
        return save(self._tensors, self._header | {"digest": self.digest})

    @classmethod
    def from_bytes(cls, source: str, content: bytes) -> "Background":
        """Return the background in a file's content. Raises `AdapterFormatError` about `source` with every fault."""
        names, optional_keys = ("mean", "whitening", *GAUSSIAN_NAMES), (NUM_ORIGINAL, LOG_ODDS_KEY)
        tensors, metadata = _parse(source, content, ("base",), names, optional_keys)
        number, num_gaussians = metadata.get(NUM_ORIGINAL), len(tensors["means"])
        faults = []
        if number is not None and number not in map(str, range(1, num_gaussians)):
            expected = f"expected a number below {num_gaussians}, its number of Gaussians"
            faults.append(f"has {NUM_ORIGINAL} {number!r} in its metadata, {expected}")
        if (log_odds := _parse_log_odds(metadata.get(LOG_ODDS_KEY, repr(LOG_ODDS)))) is None:
            faults.append(f"has {LOG_ODDS_KEY} {metadata[LOG_ODDS_KEY]!r} in its metadata, expected {MIN_LOG_ODDS:g} to 0")
        if faults or log_odds is None:
            raise AdapterFormatError(source, faults)
        gaussians = _gaussians_of(tensors)
        return cls(metadata["base"], tensors["mean"], tensors["whitening"], gaussians, int(number or 0), log_odds)


def _parse_log_odds(text: str) -> float | None:
    """Return the number, or None if it is none, or out of range."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if MIN_LOG_ODDS <= value <= 0 else None


def fit_background(base_digest: str, groups: Sequence[Array]) -> Background:
    """Return the background of groups of prompts with features (P, F), such as code, and messages in some language.

    There is a Gaussian for each group.
    """
    everything = np.concatenate(groups)
    mean = everything.mean(0)
    covariance = np.cov(everything.T)
    covariance += 1e-6 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    whitening = np.linalg.cholesky(np.linalg.inv(covariance))
    whitened = [(group - mean) @ whitening for group in groups]
    gaussians = joined([fit_gaussian(group) for group in whitened])
    return Background(base_digest, as_float32(mean), as_float32(whitening), gaussians)


def find_background(base: BaseIdentity, path: Path | None = None) -> Background | None:
    """Return the background as `load_background`, or None if no `path` is given and this package has none for the base."""
    return load_background(base, path) if path or _shipped(base).exists() else None


def _shipped(base: BaseIdentity) -> Path:
    return BACKGROUNDS / f"{base.digest[:NUM_VERSION_DIGITS]}.safetensors"


def load_background(base: BaseIdentity, path: Path | None = None) -> Background:
    """Return the background of a base: the file at `path`, or the one in this package.

    Raises `AdapterError` if there is none, and if it cannot be read, is unsound, or is of another base.
    """
    file = path or _shipped(base)
    try:
        content = file.read_bytes()
    except OSError as error:
        advice = "make one with python -m training.background, and name it by --background"
        absence = f"there is no background for the base {base.name}: {advice}"
        raise AdapterError(f"{path} cannot be read: {error.strerror}" if path else absence) from error
    try:
        background = Background.from_bytes(str(file), content)
    except AdapterFormatError as error:
        raise AdapterError(f"{printable(str(file))} is not a sound background: {'; '.join(error.shown)}") from error
    if background.base_digest != base.digest:
        digest, expected_digest = (whole[:NUM_VERSION_DIGITS] for whole in (background.base_digest, base.digest))
        fault = f"the base's digest is {digest}, expected {expected_digest}: it is the background of another base"
        raise AdapterError(f"{printable(str(file))}: {fault}")
    return background


@dataclass(frozen=True, eq=False)
class PromptStatistics:
    """The prompts of one adapter: a Gaussian for each form in which they are asked."""

    adapter_digest: str
    """Digest of the adapter's content."""
    background_digest: str
    """See `Background.original_digest`."""
    gaussians: Gaussians

    def to_bytes(self) -> bytes:
        """Return the content of the statistics' file."""
        tensors = _tensors_of(self.gaussians)
        metadata = {"adapter": self.adapter_digest, "background": self.background_digest}
        return save(tensors, metadata | {"digest": _digest(tensors, metadata)})

    @classmethod
    def from_bytes(cls, source: str, content: bytes) -> "PromptStatistics":
        """Return the statistics in a file's content. Raises `AdapterFormatError` about `source` with every fault."""
        tensors, metadata = _parse(source, content, ("adapter", "background"), GAUSSIAN_NAMES)
        return cls(metadata["adapter"], metadata["background"], _gaussians_of(tensors))


def _tensors_of(gaussians: Gaussians) -> dict[str, Tensor]:
    return {name: getattr(gaussians, name) for name in GAUSSIAN_NAMES}


def _gaussians_of(tensors: Mapping[str, Tensor]) -> Gaussians:
    return Gaussians(**{name: tensors[name] for name in GAUSSIAN_NAMES})


def _dtype(name: str) -> str:
    return "|i1" if name == "axes" else "<f4"


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    sha = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        sha.update(f"{name}|{tensors[name].shape}|".encode())
        sha.update(np.ascontiguousarray(tensors[name], _dtype(name)).data)
    return sha.hexdigest()


def _parse(
    source: str, content: bytes, keys: Sequence[str], names: Sequence[str], optional_keys: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file. Raises `AdapterFormatError` about `source` with every fault."""
    try:
        tensors, metadata = load(content), _metadata(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise AdapterFormatError(source, [f"is not a safetensors file: {error}"]) from error
    if faults := [*_metadata_faults(metadata, keys, optional_keys), *_tensor_faults(tensors, names)]:
        raise AdapterFormatError(source, faults)
    described = {key: value for key, value in metadata.items() if key != "digest"}
    if (digest := _digest(tensors, described)) != metadata["digest"]:
        raise AdapterFormatError(
            source, [f"its digest is {digest}, expected {metadata['digest']}: it was changed, or is damaged"]
        )
    return tensors, described


def _metadata(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return dict(metadata)


def _metadata_faults(metadata: Mapping[str, str], keys: Sequence[str], optional_keys: Sequence[str]) -> list[str]:
    expected = {*keys, "digest"}
    faults = [f"has no {key!r} in its metadata" for key in sorted(expected - metadata.keys())]
    unknown = metadata.keys() - expected - {*optional_keys}
    return faults + [f"has an unknown {key!r} in its metadata" for key in sorted(unknown)]


def _tensor_faults(tensors: Mapping[str, Tensor], names: Sequence[str]) -> list[str]:
    hints = {"scales": ": it has an older layout; make it again, or remove it"}
    faults = [f"has no tensor {name!r}{hints.get(name, '')}" for name in names if name not in tensors]
    faults += [f"has an unknown tensor {name!r}" for name in sorted(tensors.keys() - {*names})]
    if faults:
        return faults
    count = len(tensors["means"]) if tensors["means"].ndim else 0
    shapes = {
        "mean": (NUM_FEATURES,),
        "whitening": (NUM_FEATURES, NUM_FEATURES),
        "means": (count, NUM_FEATURES),
        "axes": (count, NUM_AXES, NUM_FEATURES),
        "scales": (count, NUM_AXES),
        "variances": (count,),
    }
    for name in names:
        tensor = tensors[name]
        if tensor.dtype != _dtype(name) or tensor.shape != shapes[name]:
            faults.append(f"{name}: {tensor.dtype} {tensor.shape}, expected {np.dtype(_dtype(name))} {shapes[name]}")
        elif not np.isfinite(tensor).all():
            faults.append(f"{name}: values that are not finite")
    if not 1 <= count <= MAX_GAUSSIANS:
        faults.append(f"has {count} Gaussians, expected 1 to {MAX_GAUSSIANS}")
    return faults or _range_faults(_gaussians_of(tensors))


def _range_faults(gaussians: Gaussians) -> list[str]:
    faults = []
    if (magnitude := np.abs(gaussians.means).max()) > MAX_MAGNITUDE:
        faults.append(f"means: {magnitude:g}, expected {MAX_MAGNITUDE:g} at most")
    least, largest = gaussians.variances.min(), gaussians.variances.max()
    if least < 1 / MAX_MAGNITUDE or largest > MAX_MAGNITUDE:
        faults.append(f"variances: {least:g} to {largest:g}, expected {1 / MAX_MAGNITUDE:g} to {MAX_MAGNITUDE:g}")
    try:  # takes a tenth of the time of singular values
        gaussians.cholesky(REFUSED_NORM)
    except np.linalg.LinAlgError:
        faults.append(f"axes: a spectral norm of {REFUSED_NORM} or more")
    return faults
