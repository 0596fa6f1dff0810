"""Statistics of the prompts that an adapter is for, and of prompts that are no adapter's.

The frozen base alone decides: its first layers read the prompt's last message (`ProbedPrompt`), and the features z of the prompt
are a fixed random projection of what the next layer's attention reads. An adapter's statistics are a Gaussian of z for each form
of its prompts. The background has Gaussians of everything else: a prompt that fits those better is nobody's.

All Gaussians are in the space in which the background's covariance is the identity. Shapes: F features, K axes, N width of the
base, P prompts.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lgamma, log, log1p, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lori.errors import AdapterError, AdapterFormatError, TemplateError
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
NUM_AXES = 8
"""Directions in which a Gaussian has a variance of its own; in all others it has one common variance."""
SHRINKAGE = 0.3
"""Share of the background's covariance in the covariance of a Gaussian."""
FREEDOM = 8
"""Degrees of freedom of the background's heavy-tailed distribution."""
MAX_CONTENT_CHARACTERS, MAX_CONTENT_TOKENS = 8192, 512
"""Characters of the last message that are tokenized, and tokens of it that are read, from its end."""
MAX_PROBED_TOKENS = 1024
"""Tokens that are read together with those of the chat template, from their end."""
SENTINEL = "\ue000"
"""A character without a meaning or a case. Templates write it as they write a message's content."""
MAX_GAUSSIANS = 64
BACKGROUNDS = Path(__file__).parent / "backgrounds"
"""The backgrounds that come with this package, by the base's digest."""
PROBED_LAYERS_DIVISOR = 5
"""The base's first layers compute the features: their number divided by this."""

GAUSSIAN_NAMES = ("means", "axes", "variances")
"""Tensors of a `Gaussians`, in files too."""

Array = npt.NDArray[np.float64]


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
class Gaussians:
    """C Gaussians of F features, each with covariance v I + sum of (l_k) a_k a_k^T over K unit axes a_k."""

    means: npt.NDArray[np.float32]
    """(C, F)"""
    axes: npt.NDArray[np.float32]
    """(C, K, F). Each axis a_k is multiplied by sqrt(l_k / (l_k + v)), so that the squared distance of z is
    (|z - m|^2 - |axes (z - m)|^2) / v."""
    variances: npt.NDArray[np.float32]
    """(C,), v"""

    @cached_property
    def log_determinants(self) -> Array:
        """The logarithms of the covariances' determinants, (C,)."""
        # The determinant of C is v^F times the product of (l_k + v) / v, and |axis|^2 = l_k / (l_k + v).
        squares = (self.axes.astype(np.float64) ** 2).sum(-1)
        determinants: Array = self.means.shape[1] * np.log(self.variances.astype(np.float64)) - np.log1p(-squares).sum(-1)
        return determinants

    @property
    def loadings(self) -> Array:
        """Factor loadings sqrt(l_k) a_k, (C, K, F). The covariance is v I plus the sum of their outer products."""
        squares = (self.axes.astype(np.float64) ** 2).sum(-1)  # q = l / (l + v), so that l = v q / (1 - q)
        loadings: Array = self.axes * np.sqrt(self.variances[:, None] / (1 - squares))[:, :, None]
        return loadings

    def log_likelihoods(self, z: Array) -> Array:
        """Return the log-likelihood of z (F,) under each Gaussian, (C,), without the term that all of them share."""
        return log_likelihoods([self], z)

    def draw(self, num_draws: int, seed: int) -> Array:
        """Return `num_draws` random whitened features of each Gaussian, (C, num_draws, F). A seed gives the same ones again."""
        random = np.random.default_rng(seed)
        spherical = random.standard_normal((len(self.means), num_draws, self.means.shape[1]))
        along = random.standard_normal((len(self.means), num_draws, self.axes.shape[1]))
        draws: Array = self.means[:, None] + np.sqrt(self.variances)[:, None, None] * spherical + along @ self.loadings
        return draws


def log_likelihoods(parts: Sequence[Gaussians], z: Array) -> Array:
    """Return the log-likelihood of z (F,) under each Gaussian of all `parts`, in order, as `Gaussians.log_likelihoods`.

    In one call: part by part it takes ten times as long.
    """
    means, axes, variances = (np.concatenate([getattr(part, name) for part in parts]) for name in GAUSSIAN_NAMES)
    determinants = np.concatenate([part.log_determinants for part in parts])
    difference = z - means
    along = (axes @ difference[:, :, None])[:, :, 0]  # (C, K)
    distances = ((difference**2).sum(-1) - (along**2).sum(-1)) / variances
    result: Array = -0.5 * (distances + determinants)
    return result


def fit_gaussian(z: Array, weights: Array | None = None, shrinkage: float = SHRINKAGE) -> Gaussians:
    """Return the Gaussian of z (P, F), in the whitened space, with `weights` (P,) of the prompts; C is 1."""
    share = np.full(len(z), 1 / len(z)) if weights is None else weights / weights.sum()
    mean = share @ z
    centred = z - mean
    covariance = (1 - shrinkage) * (centred.T * share) @ centred + shrinkage * np.eye(z.shape[1])
    values, vectors = np.linalg.eigh(covariance)
    variance = values[:-NUM_AXES].mean()
    excess = np.maximum(values[-NUM_AXES:] - variance, 0)
    axes = vectors[:, -NUM_AXES:].T * np.sqrt(excess / (excess + variance))[:, None]
    return Gaussians(_stored(mean[None]), _stored(axes[None]), _stored(np.array([variance])))


def _stored(values: Array) -> npt.NDArray[np.float32]:
    # safetensors writes the memory of an array as it lies.
    return np.ascontiguousarray(values, np.float32)


def joined(parts: Sequence[Gaussians]) -> Gaussians:
    """Return the Gaussians of all `parts`."""
    return Gaussians(*(_stored(np.concatenate([getattr(part, name) for part in parts])) for name in GAUSSIAN_NAMES))


def mean_covariance(gaussians: Sequence[Gaussians]) -> Array:
    """Return the mean (F, F) of the covariances of all Gaussians."""
    num_gaussians, num_features = sum(len(one.means) for one in gaussians), gaussians[0].means.shape[1]
    total = np.zeros((num_features, num_features))
    for one in gaussians:
        flat = one.loadings.reshape(-1, num_features)
        total += flat.T @ flat
        total[np.diag_indices(num_features)] += one.variances.sum()
    return total / num_gaussians


@dataclass(frozen=True, eq=False)
class Background:
    """Prompts that are no adapter's: the whitening that all statistics use, and Gaussians of ordinary prompts."""

    base_digest: str
    mean: npt.NDArray[np.float32]
    """(F,)"""
    whitening: npt.NDArray[np.float32]
    """(F, F): (z - mean) @ whitening has the identity as its covariance over all prompts of the background."""
    gaussians: Gaussians

    @cached_property
    def digest(self) -> str:
        """The sha256 (hex) of the content. Statistics name the background that they were made with."""
        return _digest(self._tensors, {"base": self.base_digest})

    def whiten(self, z: Array) -> Array:
        """Return features (…, F) in the space of the Gaussians."""
        return (z - self.mean) @ self.whitening

    def log_likelihood(self, z: Array) -> float:
        """Return the log-likelihood of z (F,), whitened, without the term that all densities here share.

        In equal parts with the Gaussians there is Student's t distribution of all prompts together, with `FREEDOM` degrees of
        freedom. It has heavy tails, so that a prompt unlike all others is nobody's.
        """
        scale = (FREEDOM - 2) / FREEDOM  # with this scale the covariance is the identity
        distance, both = float(z @ z) / scale, (FREEDOM + len(z)) / 2
        wide = lgamma(both) - lgamma(FREEDOM / 2) - len(z) / 2 * log(FREEDOM * scale / 2) - both * log1p(distance / FREEDOM)
        return _log_mean_exp(np.append(self.gaussians.log_likelihoods(z), wide))

    @property
    def _tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        return {"mean": self.mean, "whitening": self.whitening, **_tensors_of(self.gaussians)}

    def to_bytes(self) -> bytes:
        """Return the content of the background's file."""
        return save(self._tensors, {"base": self.base_digest, "digest": self.digest})

    @classmethod
    def from_bytes(cls, source: str, content: bytes) -> "Background":
        """Return the background in a file's content. Raises `AdapterFormatError` about `source` with every fault."""
        tensors, metadata = _parse(source, content, ("base",), ("mean", "whitening", *GAUSSIAN_NAMES))
        return cls(metadata["base"], tensors["mean"], tensors["whitening"], _gaussians_of(tensors))


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
    return Background(base_digest, _stored(mean), _stored(whitening), gaussians)


def find_background(base: BaseIdentity, path: Path | None = None) -> Background | None:
    """Return the background of a base: the file at `path`, or that of this package, if it has one. Raises `AdapterError`."""
    return load_background(base, path) if path or _shipped(base).exists() else None


def _shipped(base: BaseIdentity) -> Path:
    return BACKGROUNDS / f"{base.digest[:NUM_VERSION_DIGITS]}.safetensors"


def load_background(base: BaseIdentity, path: Path | None = None) -> Background:
    """Return the background as `find_background`. Raises `AdapterError` if there is none, too."""
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
        digest = background.base_digest[:NUM_VERSION_DIGITS]
        raise AdapterError(f"{file} is the background of another base than {base.name}: {digest}")
    return background


@dataclass(frozen=True, eq=False)
class PromptStatistics:
    """The prompts of one adapter: a Gaussian for each form in which they are asked."""

    adapter_digest: str
    """Digest of the adapter's content."""
    background_digest: str
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


def _log_mean_exp(values: Array) -> float:
    """Return log(mean(exp(values))), without overflow."""
    largest = values.max()
    return float(largest + np.log(np.exp(values - largest).mean()))


def _tensors_of(gaussians: Gaussians) -> dict[str, npt.NDArray[np.float32]]:
    return {name: getattr(gaussians, name) for name in GAUSSIAN_NAMES}


def _gaussians_of(tensors: Mapping[str, npt.NDArray[np.float32]]) -> Gaussians:
    return Gaussians(tensors["means"], tensors["axes"], tensors["variances"])


def _digest(tensors: Mapping[str, npt.NDArray[np.float32]], metadata: Mapping[str, str]) -> str:
    sha = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        sha.update(f"{name}|{tensors[name].shape}|".encode())
        sha.update(np.ascontiguousarray(tensors[name], "<f4").data)
    return sha.hexdigest()


def _parse(
    source: str, content: bytes, keys: Sequence[str], names: Sequence[str]
) -> tuple[dict[str, npt.NDArray[np.float32]], dict[str, str]]:
    """Return the tensors and the metadata of a file. Raises `AdapterFormatError` about `source` with every fault."""
    try:
        tensors, metadata = load(content), _metadata(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise AdapterFormatError(source, [f"is not a safetensors file: {error}"]) from error
    if faults := [*_metadata_faults(metadata, keys), *_tensor_faults(tensors, names)]:
        raise AdapterFormatError(source, faults)
    described = {key: metadata[key] for key in keys}
    if (digest := _digest(tensors, described)) != metadata["digest"]:
        raise AdapterFormatError(
            source, [f"its digest is {digest}, expected {metadata['digest']}: it was changed, or is damaged"]
        )
    return tensors, described


def _metadata(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return dict(metadata)


def _metadata_faults(metadata: Mapping[str, str], keys: Sequence[str]) -> list[str]:
    expected = {*keys, "digest"}
    faults = [f"has no {key!r} in its metadata" for key in sorted(expected - metadata.keys())]
    return faults + [f"has an unknown {key!r} in its metadata" for key in sorted(metadata.keys() - expected)]


def _tensor_faults(tensors: Mapping[str, npt.NDArray[np.float32]], names: Sequence[str]) -> list[str]:
    faults = [f"has no tensor {name!r}" for name in names if name not in tensors]
    faults += [f"has an unknown tensor {name!r}" for name in sorted(tensors.keys() - {*names})]
    if faults:
        return faults
    count = len(tensors["means"]) if tensors["means"].ndim else 0
    shapes = {
        "mean": (NUM_FEATURES,),
        "whitening": (NUM_FEATURES, NUM_FEATURES),
        "means": (count, NUM_FEATURES),
        "axes": (count, NUM_AXES, NUM_FEATURES),
        "variances": (count,),
    }
    for name in names:
        tensor = tensors[name]
        if tensor.dtype != np.float32 or tensor.shape != shapes[name]:
            faults.append(f"{name}: {tensor.dtype} {tensor.shape}, expected float32 {shapes[name]}")
        elif not np.isfinite(tensor).all():
            faults.append(f"{name}: values that are not finite")
    if not 1 <= count <= MAX_GAUSSIANS:
        faults.append(f"has {count} Gaussians, expected 1 to {MAX_GAUSSIANS}")
    if not faults and not (tensors["variances"] > 0).all():
        faults.append("variances: not all are positive")
    if not faults and not (np.linalg.norm(tensors["axes"].astype(np.float64), 2, (1, 2)) < 1).all():
        faults.append("axes: not all are shorter than 1")  # a distance could be negative
    return faults
