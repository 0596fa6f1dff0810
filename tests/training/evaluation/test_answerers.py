"""Answerers: a server and a loaded model give the same answers and scores."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lori.base_model import BaseModel, load_base_model
from lori.basis import Seeded
from lori.template import Message
from server.loading import load_service
from server.settings import Settings
from tests.server.live import serve_here
from training.batches import group_by_length
from training.evaluation.answerer import Answerer, AnswerError, Prompt, Sampling
from training.evaluation.local_answerer import LocalAnswerer
from training.evaluation.server_answerer import Server, ServerAnswerer
from training.packing import ATTENTION
from training.trainable import wrap

PROMPTS = ["why?", "a much longer prompt than that, é", "x", "end\n"]


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_base_model(str(tiny_model), torch.float32)


@pytest.fixture(scope="module")
def url(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of a server in this process."""
    none = str(tmp_path_factory.mktemp("none"))
    settings = Settings(model=str(tiny_model), adapters=none, dtype="float32", threads=1, kv_cache_gib=0.02)
    with serve_here(load_service(settings)) as client:
        yield str(client.base_url).rstrip("/")


@pytest.fixture(params=["server", "local", "packed", "wrapped"])
def answerer(request: pytest.FixtureRequest, tiny_model: Path, base: BaseModel) -> Answerer:
    """Return the same model in four forms; "packed" and "wrapped" are its forms during training."""
    if request.param == "server":
        return ServerAnswerer(Server(request.getfixturevalue("url")))
    if request.param == "local":
        return LocalAnswerer(base.model, base.tokenizer, batch_tokens=16)
    loaded = load_base_model(str(tiny_model), torch.float32, ATTENTION)
    if request.param == "wrapped":
        wrap(loaded.model, ["q_proj", "down_proj"], Seeded(), 4, 8.0)
    return LocalAnswerer(loaded.model, loaded.tokenizer)


def greedy(base: BaseModel, prompt: str, max_tokens: int) -> str:
    ids = base.tokenizer.backend_tokenizer.encode(prompt).ids
    out = base.model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=max_tokens, do_sample=False
    )  # type: ignore[operator]
    text: str = base.tokenizer.backend_tokenizer.decode(out[0, len(ids) :].tolist())
    return text.rstrip("\ufffd")


def test_a_wrapped_model_answers_with_its_delta(tiny_model: Path, base: BaseModel) -> None:
    """The answers are those of a base with the delta folded into its weights."""
    wrapped, folded = (load_base_model(str(tiny_model), torch.float32, attention) for attention in (ATTENTION, "sdpa"))
    generator = torch.Generator().manual_seed(0)
    for name, layer in wrap(wrapped.model, ["q_proj", "down_proj"], Seeded(), 4, 8.0).items():
        b = torch.randn(layer.num_outputs, 4, generator=generator)
        with torch.no_grad():
            layer.b.change.copy_(b)
            folded.model.get_submodule(name).weight.add_(2 * b @ Seeded().draw(name, 4, layer.linear.in_features))
    local = LocalAnswerer(wrapped.model, wrapped.tokenizer)
    answers = [[greedy(folded, prompt, 20)] for prompt in PROMPTS]
    assert local.complete(PROMPTS, Sampling(max_tokens=20)) == answers
    assert answers != [[greedy(base, prompt, 20)] for prompt in PROMPTS]
    texts: list[tuple[Prompt, str]] = [("why?", " because"), ("a\n", "b")]
    expected = LocalAnswerer(folded.model, folded.tokenizer).log_likelihoods(texts)
    for likelihood, expected_likelihood in zip(local.log_likelihoods(texts), expected, strict=True):
        assert likelihood.total == pytest.approx(expected_likelihood.total, abs=1e-3)


def test_a_greedy_answer_is_the_model_s_own_up_to_a_stop_text(answerer: Answerer, base: BaseModel) -> None:
    full = [greedy(base, prompt, 20) for prompt in PROMPTS]
    assert answerer.complete(PROMPTS, Sampling(max_tokens=20)) == [[text] for text in full]
    stop = [full[0][3:5], full[1][7]]
    cut = [text[: min(text.find(s) % 1000 for s in stop)] for text in full]
    assert answerer.complete(PROMPTS, Sampling(max_tokens=20, stop=tuple(stop))) == [[text] for text in cut]
    assert len(cut[0]) <= 3


def test_a_stop_text_in_the_prompt_is_ignored(answerer: Answerer, base: BaseModel) -> None:
    text = greedy(base, PROMPTS[3], 8)
    assert answerer.complete([PROMPTS[3]], Sampling(max_tokens=8, stop=("\n" + text[0], "end"))) == [[text]]


def test_drawn_answers_depend_on_the_seed_alone(answerer: Answerer) -> None:
    def draw(seed: int) -> list[list[str]]:
        return answerer.complete(PROMPTS, Sampling(max_tokens=12, num_answers=3, temperature=1.0, seed=seed))

    torch.manual_seed(11)
    first = draw(7)
    assert [len(answers) for answers in first] == [3] * len(PROMPTS)
    assert all(len(set(answers)) == 3 for answers in first)
    torch.rand(1)
    assert first == draw(7)
    assert first != draw(8)


def test_a_likelihood_is_that_of_the_completion_s_tokens(answerer: Answerer, base: BaseModel) -> None:
    texts: list[tuple[Prompt, str]] = [
        ("why?", " because"), ("x é", "\nö or not, and a longer one of these"), ("a\n", "b"), ("no more", "")
    ]  # fmt: skip
    for (prompt, completion), likelihood in zip(texts, answerer.log_likelihoods(texts), strict=True):
        num_prompt, ids = len(prompt.encode()), [*base.tokenizer.backend_tokenizer.encode(prompt + completion).ids]
        scores = base.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert likelihood.num_tokens == len(completion.encode())
        assert likelihood.total == pytest.approx(sum(scores[i - 1, ids[i]].item() for i in range(num_prompt, len(ids))), abs=1e-4)


def test_a_completion_is_scored_as_training_writes_it(answerer: Answerer) -> None:
    # If there is no space between prompt and completion, training puts a newline there; scoring must do the same.
    apart, together = answerer.log_likelihoods([("p", "\nab"), ("p", "ab")])
    assert apart.num_tokens == 3
    assert apart.total == pytest.approx(together.total, abs=1e-4)
    assert together.num_tokens == 3


def test_empty_requests_give_empty_answers(answerer: Answerer) -> None:
    assert answerer.complete([], Sampling(max_tokens=1)) == []
    assert answerer.log_likelihoods([]) == []
    assert [likelihood.num_tokens for likelihood in answerer.log_likelihoods([("a", "")])] == [0]


def test_conversations_are_written_in_a_template(base: BaseModel, url: str) -> None:
    talk = [Message(role="user", content="why?"), Message(role="assistant", content="so"), Message(role="user", content="oh")]
    local = LocalAnswerer(base.model, base.tokenizer, template="chat")
    server = ServerAnswerer(Server(url), template="chat")
    assert local.complete([talk, "why?"], Sampling(max_tokens=9)) == server.complete([talk, "why?"], Sampling(max_tokens=9))
    texts: list[tuple[Prompt, str]] = [(talk, " because"), ("why?", "é")]
    for likelihood, server_likelihood in zip(local.log_likelihoods(texts), server.log_likelihoods(texts), strict=True):
        assert likelihood.num_tokens == server_likelihood.num_tokens > 0
        assert likelihood.total == pytest.approx(server_likelihood.total, abs=1e-4)
    plain = LocalAnswerer(base.model, base.tokenizer)
    assert plain.complete([talk], Sampling(max_tokens=9)) == ServerAnswerer(Server(url)).complete([talk], Sampling(max_tokens=9))


def test_a_prompt_beyond_the_context_is_refused(answerer: Answerer) -> None:
    with pytest.raises(AnswerError, match="context"):
        answerer.complete(["x" * 510], Sampling(max_tokens=9))
    with pytest.raises(AnswerError, match="context"):
        answerer.log_likelihoods([("x" * 510, "x" * 9)])


def test_a_model_in_training_is_left_as_it_was(tiny_model: Path) -> None:
    base = load_base_model(str(tiny_model), torch.float32, ATTENTION)
    layers = wrap(base.model, ["q_proj"], Seeded(), 4, 8.0)
    base.model.train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    local = LocalAnswerer(base.model, base.tokenizer)
    local.complete(["a"], Sampling(max_tokens=3, temperature=1.0))
    local.log_likelihoods([("a", "b")])
    assert torch.equal(torch.rand(1), expected)
    assert base.model.training
    assert base.model.config._attn_implementation == ATTENTION
    assert all(parameter.requires_grad for layer in layers.values() for parameter in layer.b.parameters())


def test_batches_hold_texts_of_like_length() -> None:
    lengths = [3, 9, 1, 8, 30]
    groups = list(group_by_length(lengths, 18))
    assert groups == [[4], [1, 3], [0, 2]]
    assert list(group_by_length([], 18)) == []


@pytest.mark.slow
def test_a_token_that_begins_in_the_prompt_s_last_space_counts() -> None:
    """Regression: the embedded model's tokenizer has " Paris" as one token, which was counted as a token of the prompt."""
    base = load_base_model(None, torch.float32)
    local = LocalAnswerer(base.model, base.tokenizer)
    apart, together = local.log_likelihoods([("The capital of France is ", "Paris"), ("The capital of France is", " Paris")])
    assert apart.num_tokens == together.num_tokens == 1
    assert apart.total == pytest.approx(together.total, abs=1e-4)
