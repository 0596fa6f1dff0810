"""Statistics of prompts: the tokens that are probed, the background, and the files."""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save
from transformers import PreTrainedTokenizerFast

from lori.auto_weights import shares
from lori.errors import AdapterError, AdapterFormatError, TemplateError
from lori.gaussians import NUM_AXES, fit_gaussian, joined, log_likelihoods
from lori.identity import BaseIdentity
from lori.prompt_statistics import (
    MAX_CONTENT_CHARACTERS,
    MAX_CONTENT_TOKENS,
    MAX_PROBED_TOKENS,
    NUM_FEATURES,
    Background,
    ProbedPrompt,
    PromptStatistics,
    fit_background,
    load_background,
    num_probe_layers,
    probed_prompt,
    project,
    projection_matrix,
)
from lori.template import Message
from tests.lori.features import draw
from tests.tiny import tiny_tokenizer

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}<assistant>"


def test_the_background_is_white() -> None:
    groups = [draw(1, count=400), draw(2, 1.0, count=400)]
    background = fit_background("b" * 64, groups)
    whitened = background.whiten(np.concatenate(groups))
    np.testing.assert_allclose(np.cov(whitened.T), np.eye(NUM_FEATURES), atol=1e-3)


def test_each_part_of_the_background_s_mixture_counts_the_same(background: Background) -> None:
    again = Background(background.base_digest, background.mean, background.whitening, joined([background.gaussians] * 3))
    z = background.whiten(draw(1, count=1)[0])
    by_gaussian = log_likelihoods(background.gaussians.components, z).tolist()
    once, count = background.log_likelihood(z, by_gaussian), len(by_gaussian)
    part = count / (count + 1) * np.exp(np.subtract(by_gaussian, once)).mean()  # of the Gaussians
    assert 0 < part < 1
    expected = once + np.log((1 + 2 * part) * (count + 1) / (3 * count + 1))
    assert again.log_likelihood(z, log_likelihoods(again.gaussians.components, z).tolist()) == pytest.approx(expected)


def test_files_are_read_as_they_were_written(background: Background, adapters: Sequence[PromptStatistics]) -> None:
    read = PromptStatistics.from_bytes("a", adapters[0].to_bytes())
    assert (read.adapter_digest, read.background_digest) == ("a" * 64, background.digest)
    np.testing.assert_array_equal(read.gaussians.axes, adapters[0].gaussians.axes)
    again = Background.from_bytes("b", background.to_bytes())
    assert again.digest == background.digest
    np.testing.assert_array_equal(again.whitening, background.whitening)


def test_a_background_can_be_extended_again_and_again(background: Background) -> None:
    groups = [draw(seed, 3.0) for seed in (21, 22, 23)]
    once = background.extended(groups[:1])
    extended = Background.from_bytes("b", once.extended(groups[1:]).to_bytes())
    assert extended.num_original == len(background.gaussians.means)
    for one in (background, once, extended):
        assert one.original_digest == background.digest
    assert len({background.digest, once.digest, extended.digest}) == 3
    added = fit_gaussian(background.whiten(groups[2]))
    np.testing.assert_array_equal(extended.gaussians.means[-1], added.means[0])
    np.testing.assert_array_equal(extended.gaussians.axes[-1], added.axes[0])


def test_statistics_hold_for_an_extended_background(background: Background, adapters: Sequence[PromptStatistics]) -> None:
    extended = background.extended([draw(11, 3.0)])  # the prompts of the first adapter
    [own], [other] = draw(11, 3.0, count=1), draw(12, 3.0, count=1)
    assert shares(own, background, adapters).weights == (1.0, 0.0, 0.0)
    odds = 4 * np.exp(background.log_odds)  # the background has three Gaussians and the t distribution
    assert shares(own, extended, adapters).base == pytest.approx(1 / (1 + odds), abs=1 / 16)
    assert shares(other, extended, adapters).weights == (0.0, 1.0, 0.0)


def test_a_background_keeps_its_prior(background: Background) -> None:
    assert Background.from_bytes("b", background.to_bytes()).log_odds == -7
    other = replace(background, log_odds=-2.5)
    again = Background.from_bytes("b", other.extended([draw(21)]).to_bytes())
    assert (again.log_odds, again.original_digest) == (-2.5, background.digest)
    assert (other.original_digest, other.digest != background.digest) == (background.digest, True)


@pytest.mark.parametrize("log_odds", [0.5, -101.0, float("nan"), float("inf")])
def test_a_wrong_prior_is_refused(background: Background, log_odds: float) -> None:
    content = replace(background, log_odds=log_odds).to_bytes()
    with pytest.raises(AdapterFormatError, match=f"has log_odds '{log_odds}' in its metadata, expected -100 to 0"):
        Background.from_bytes("b", content)


@pytest.mark.parametrize("number", [3, 99, -1])
def test_a_wrong_number_of_original_gaussians_is_refused(background: Background, number: int) -> None:
    content = replace(background.extended([draw(21)]), num_original=number).to_bytes()
    with pytest.raises(AdapterFormatError, match=f"has num_original '{number}' in its metadata, expected a number below 3"):
        Background.from_bytes("b", content)


def test_a_changed_number_of_original_gaussians_is_refused(background: Background) -> None:
    content = background.extended([draw(21)]).to_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    with pytest.raises(AdapterFormatError, match="it was changed, or is damaged"):
        Background.from_bytes("b", save(load(content), metadata | {"num_original": "1"}))


def test_statistics_take_13_kb_a_form(adapters: Sequence[PromptStatistics]) -> None:
    num_bytes = NUM_AXES * (NUM_FEATURES + 4) + 4 * (NUM_FEATURES + 1)
    assert num_bytes <= 13_400
    assert num_bytes <= len(adapters[0].to_bytes()) <= num_bytes + 640


@pytest.mark.parametrize(("norm", "is_read"), [(0.9994, True), (0.9996, False)])
def test_axes_are_read_up_to_a_spectral_norm(background: Background, norm: float, is_read: bool) -> None:
    gaussians = fit_gaussian(background.whiten(draw(3)))
    longest = np.linalg.norm(gaussians.axes[0] * gaussians.scales[0][:, None].astype(np.float64), 2)
    scaled = replace(gaussians, scales=(gaussians.scales * norm / longest).astype(np.float32))
    content = PromptStatistics("a" * 64, background.digest, scaled).to_bytes()
    with nullcontext() if is_read else pytest.raises(AdapterFormatError, match=r"a spectral norm of 0\.9995 or more"):
        PromptStatistics.from_bytes("the file", content)


Change = Callable[[dict[str, np.ndarray], dict[str, str]], object]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda tensors, _: tensors.pop("axes"), "has no tensor 'axes'"),
        (lambda tensors, _: tensors.update(more=np.zeros(1, np.float32)), "has an unknown tensor 'more'"),
        (
            lambda tensors, _: tensors.update(means=tensors["means"][:, 1:].copy()),
            "means: float32 (1, 191), expected float32 (1, 192)",
        ),
        (lambda tensors, _: tensors.update(means=tensors["means"].astype(np.float64)), "expected float32 (1, 192)"),
        (lambda tensors, _: tensors.update(means=tensors["means"] * np.nan), "means: values that are not finite"),
        (lambda tensors, _: tensors.update(means=tensors["means"] + 2e9), "means: 2e+09, expected 1e+09 at most"),
        (lambda tensors, _: tensors.update(variances=-tensors["variances"]), "variances: -"),
        (lambda tensors, _: tensors.update(variances=tensors["variances"] * 1e-30), "expected 1e-09 to 1e+09"),
        (lambda tensors, _: tensors.update(variances=tensors["variances"] * 1e30), "expected 1e-09 to 1e+09"),
        (lambda tensors, _: tensors.update(scales=tensors["scales"] * 100), "axes: a spectral norm of 0.9995 or more"),
        (lambda tensors, _: tensors.update(scales=tensors["scales"] * -100), "axes: a spectral norm of 0.9995 or more"),
        (lambda tensors, _: tensors.update(scales=np.full((1, 64), 3e38, np.float32)), "axes: a spectral norm"),
        (lambda tensors, _: tensors.pop("scales"), "has no tensor 'scales': it has an older layout"),
        (lambda tensors, _: tensors.update(axes=tensors["axes"].astype(np.float32)), "axes: float32 (1, 64, 192), expected int8"),
        (lambda tensors, _: tensors.update(axes=-tensors["axes"]), "it was changed, or is damaged"),
        (lambda tensors, _: tensors.update(means=tensors["means"] + 1), "it was changed, or is damaged"),
        (lambda _, metadata: metadata.pop("background"), "has no 'background' in its metadata"),
        (lambda _, metadata: metadata.pop("adapter"), "has no 'adapter' in its metadata"),
        (lambda _, metadata: metadata.update(adapter="0" * 64), "it was changed, or is damaged"),
        (lambda _, metadata: metadata.pop("digest"), "has no 'digest' in its metadata"),
        (lambda _, metadata: metadata.update(note="x"), "has an unknown 'note' in its metadata"),
        (lambda _, metadata: metadata.update(background="0" * 64), "it was changed, or is damaged"),
    ],
)
def test_a_damaged_file_is_refused_with_its_fault(adapters: Sequence[PromptStatistics], change: Change, fault: str) -> None:
    content = adapters[0].to_bytes()
    tensors = load(content)
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    change(tensors, metadata)
    with pytest.raises(AdapterFormatError, match="the file") as error:
        PromptStatistics.from_bytes("the file", save(tensors, metadata))
    assert fault in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 100, b"\x80\x02pickle", (5).to_bytes(8, "little") + b"[1,2]"])
def test_what_is_no_safetensors_file_is_refused(content: bytes) -> None:
    with pytest.raises(AdapterFormatError, match="is not a safetensors file"):
        PromptStatistics.from_bytes("the file", content)


def test_a_cut_file_is_refused(adapters: Sequence[PromptStatistics]) -> None:
    content = adapters[0].to_bytes()
    for length in range(0, len(content), 97):
        with pytest.raises(AdapterFormatError):
            PromptStatistics.from_bytes("the file", content[:length])


def test_a_background_is_for_its_base_alone(background: Background, tmp_path: Path) -> None:
    file = tmp_path / "background.safetensors"
    file.write_bytes(background.to_bytes())
    own, other = (BaseIdentity(name="base", digest=digit * 64, shapes={}) for digit in "bc")
    assert load_background(own, file).digest == background.digest
    with pytest.raises(AdapterError, match=r"digest is b{12}, expected c{12}: it is the background of another base"):
        load_background(other, file)
    with pytest.raises(
        AdapterError, match=r"there is no background for the base base: make one with python -m training\.background"
    ):
        load_background(other)
    file.write_bytes(background.to_bytes()[:-1])
    with pytest.raises(AdapterError, match="is not a sound background: is not a safetensors file"):
        load_background(own, file)
    with pytest.raises(AdapterError, match="cannot be read: No such file"):
        load_background(own, tmp_path / "absent")


GOLDEN_FIRST = [0.007814359498526713, -0.2329618080669415, 0.24540971419223268]
GOLDEN_LAST = [0.03210509139721579, 0.012438617956678, -0.033252151814709696]


def test_the_projection_never_changes() -> None:
    drawn = projection_matrix(16)
    assert drawn.shape == (NUM_FEATURES // 2, 16)
    np.testing.assert_array_equal(drawn[0, :3], GOLDEN_FIRST)
    np.testing.assert_array_equal(drawn[-1, -3:], GOLDEN_LAST)
    assert np.abs(drawn).max() <= 1 / 4
    assert drawn.std() == pytest.approx(1 / 4 / np.sqrt(3), rel=0.05)


def test_the_features_are_the_content_s_mean_and_the_last_token() -> None:
    x, projection = np.arange(20.0).reshape(5, 4), projection_matrix(4)
    features = project(x, ProbedPrompt((1,) * 5, 1, 3), projection)
    np.testing.assert_array_equal(features, [*projection @ [6.0, 7.0, 8.0, 9.0], *projection @ x[-1]])


@pytest.mark.parametrize(("num_layers", "expected"), [(1, 1), (4, 1), (30, 6), (36, 7)])
def test_a_fifth_of_the_layers_is_probed(num_layers: int, expected: int) -> None:
    assert num_probe_layers(num_layers) == expected


def chat_tokenizer(template: str = CHAT) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def content_of(tokenizer: PreTrainedTokenizerFast, prompt: str | Sequence[Message]) -> str:
    probed = probed_prompt(tokenizer, prompt)
    return str(tokenizer.decode(probed.ids[probed.start : probed.stop]))


def test_the_last_message_of_a_user_is_probed() -> None:
    tokenizer = chat_tokenizer()
    conversation = [("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello."), ("user", " My card? ")]
    messages = [Message.model_validate({"role": role, "content": content}) for role, content in conversation]
    assert probed_prompt(tokenizer, messages) == probed_prompt(tokenizer, messages[-1:])
    assert content_of(tokenizer, messages) == "My card?"
    assert tokenizer.decode(probed_prompt(tokenizer, messages).ids) == "<user>My card?\n<assistant>"


def test_a_plain_prompt_is_probed_like_a_message() -> None:
    tokenizer = chat_tokenizer()
    assert probed_prompt(tokenizer, "My card?") == probed_prompt(tokenizer, [Message(role="user", content="My card?")])


def test_without_a_chat_template_the_text_is_probed_as_it_stands() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    probed = probed_prompt(tokenizer, "My card?")
    assert (probed.start, probed.stop) == (0, len(probed.ids))
    assert tokenizer.decode(probed.ids) == "My card?"


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "as it stands": (CHATML, lambda content: content),
    "stripped": (CHAT, str.strip),
    "upper case": (CHATML.replace("m.content", "m.content | upper"), str.upper),
    "twice": (CHATML.replace("{{ m.content }}", "{{ m.content }}, {{ m.content }}"), lambda content: f"{content}, {content}"),
}
"""Chat templates, and what each writes of a content."""


@pytest.mark.parametrize("form", TEMPLATES)
@pytest.mark.parametrize(
    "content", ["a", "start", "assistant", "user\n", "|", "<|im_end|>", " a\n", "<|im_start|>user\na", "東京?"]
)
def test_the_span_is_that_of_the_content(form: str, content: str) -> None:
    template, written = TEMPLATES[form]
    assert content_of(chat_tokenizer(template), content) == written(content)


@pytest.mark.parametrize(
    ("template", "content"),
    [
        ("<user>{{ messages[0].content | length }}<assistant>", "abc"),  # does not write the content
        ("{% if messages[0].content | length > 1 %}long: {% endif %}{{ messages[0].content }}", "abc"),  # depends on it
        (CHAT, ""),
        (CHAT, " \n"),
    ],
)
def test_where_no_content_is_seen_the_whole_text_counts(template: str, content: str) -> None:
    tokenizer = chat_tokenizer(template)
    probed = probed_prompt(tokenizer, content)
    assert (probed.start, probed.stop) == (0, len(probed.ids))


def test_of_a_long_message_the_end_is_probed() -> None:
    tokenizer = chat_tokenizer()
    probed = probed_prompt(tokenizer, "x" * 2000 + "the end")
    assert probed.stop - probed.start == MAX_CONTENT_TOKENS
    assert tokenizer.decode(probed.ids[probed.start : probed.stop]) == "x" * (MAX_CONTENT_TOKENS - 7) + "the end"
    assert tokenizer.decode(probed.ids).startswith("<user>x")
    assert tokenizer.decode(probed.ids).endswith("the end\n<assistant>")


def test_only_the_end_of_a_very_long_message_is_tokenized() -> None:
    tokenizer = chat_tokenizer("{{ messages[0].content | length }}")
    assert tokenizer.decode(probed_prompt(tokenizer, "x" * 10**6).ids) == str(MAX_CONTENT_CHARACTERS)


@pytest.mark.parametrize("num_before", [0, 10, 600, 2000])
@pytest.mark.parametrize("num_after", [0, 10, 600, 2000])
def test_a_long_template_is_cut_at_its_beginning(num_before: int, num_after: int) -> None:
    tokenizer = chat_tokenizer("b" * num_before + "{{ messages[0].content }}" + "a" * num_after)
    probed = probed_prompt(tokenizer, "x" * 600)
    whole = "b" * num_before + "x" * MAX_CONTENT_TOKENS + "a" * num_after
    assert tokenizer.decode(probed.ids) == whole[-MAX_PROBED_TOKENS:]
    span = str(tokenizer.decode(probed.ids[probed.start : probed.stop]))
    assert span == ("x" * min(MAX_CONTENT_TOKENS, MAX_PROBED_TOKENS - num_after) if num_after < 2000 else "a" * MAX_PROBED_TOKENS)


@pytest.mark.parametrize("template", ["", "{{ messages[0].content | trim }}", None])
def test_a_message_without_a_token_is_refused(template: str | None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(TemplateError, match="has no token"):
        probed_prompt(tokenizer, "")
