"""A server and a model of our own are the same kind of answerer."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lori.base_model import BaseModel, load_base_model
from lori.basis import Seeded
from lori.template import Message
from tests.server.live import start
from training.batches import like_lengths
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
    flags = ["--model", str(tiny_model), "--adapters", str(tmp_path_factory.mktemp("none")), "--dtype", "float32"]
    with start(tmp_path_factory.mktemp("live") / "log", *flags) as live:
        yield live.url


@pytest.fixture(params=["server", "local", "packed", "wrapped"])
def answerer(request: pytest.FixtureRequest, tiny_model: Path, base: BaseModel) -> Answerer:
    """The same model in four forms, two of them as training has it."""
    if request.param == "server":
        return ServerAnswerer(Server(request.getfixturevalue("url")))
    if request.param == "local":
        return LocalAnswerer(base.model, base.tokenizer, batch_tokens=16)
    own = load_base_model(str(tiny_model), torch.float32, ATTENTION)
    if request.param == "wrapped":
        wrap(own.model, ["q_proj", "down_proj"], Seeded(), 4, 8.0)
    return LocalAnswerer(own.model, own.tokenizer)


def greedy(base: BaseModel, prompt: str, max_tokens: int) -> str:
    ids = base.tokenizer.backend_tokenizer.encode(prompt).ids
    out = base.model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=max_tokens, do_sample=False
    )  # type: ignore[operator]
    text: str = base.tokenizer.backend_tokenizer.decode(out[0, len(ids) :].tolist())
    return text.rstrip("\ufffd")


def test_a_wrapped_model_answers_with_its_delta(tiny_model: Path, base: BaseModel) -> None:
    """As the base does where the delta is added to its weights."""
    own, folded = (load_base_model(str(tiny_model), torch.float32, how) for how in (ATTENTION, "sdpa"))
    generator = torch.Generator().manual_seed(0)
    for name, layer in wrap(own.model, ["q_proj", "down_proj"], Seeded(), 4, 8.0).items():
        b = torch.randn(layer.num_outputs, 4, generator=generator)
        with torch.no_grad():
            layer.b.change.copy_(b)
            folded.model.get_submodule(name).weight.add_(2 * b @ Seeded().draw(name, 4, layer.linear.in_features))
    who = LocalAnswerer(own.model, own.tokenizer)
    answers = [[greedy(folded, prompt, 20)] for prompt in PROMPTS]
    assert who.complete(PROMPTS, Sampling(max_tokens=20)) == answers
    assert answers != [[greedy(base, prompt, 20)] for prompt in PROMPTS]
    texts: list[tuple[Prompt, str]] = [("why?", " because"), ("a\n", "b")]
    expected = LocalAnswerer(folded.model, folded.tokenizer).log_likelihoods(texts)
    for one, other in zip(who.log_likelihoods(texts), expected, strict=True):
        assert one.total == pytest.approx(other.total, abs=1e-3)


def test_a_greedy_answer_is_the_model_s_own_up_to_a_stop_text(answerer: Answerer, base: BaseModel) -> None:
    whole = [greedy(base, prompt, 20) for prompt in PROMPTS]
    assert answerer.complete(PROMPTS, Sampling(max_tokens=20)) == [[text] for text in whole]
    stop = [whole[0][3:5], whole[1][7]]
    cut = [text[: min(text.find(s) % 1000 for s in stop)] for text in whole]
    assert answerer.complete(PROMPTS, Sampling(max_tokens=20, stop=tuple(stop))) == [[text] for text in cut]
    assert len(cut[0]) <= 3


def test_a_stop_text_is_not_looked_for_in_the_prompt(answerer: Answerer, base: BaseModel) -> None:
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
    for (prompt, completion), found in zip(texts, answerer.log_likelihoods(texts), strict=True):
        num_prompt, ids = len(prompt.encode()), [*base.tokenizer.backend_tokenizer.encode(prompt + completion).ids]
        scores = base.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert found.num_tokens == len(completion.encode())
        assert found.total == pytest.approx(sum(scores[i - 1, ids[i]].item() for i in range(num_prompt, len(ids))), abs=1e-4)


def test_a_completion_is_scored_as_training_writes_it(answerer: Answerer) -> None:
    # No space between: a newline parts prompt and completion, here as in training.
    apart, together = answerer.log_likelihoods([("p", "\nab"), ("p", "ab")])
    assert apart.num_tokens == 3
    assert apart.total == pytest.approx(together.total, abs=1e-4)
    assert together.num_tokens == 3


def test_nothing_is_asked_of_nobody(answerer: Answerer) -> None:
    assert answerer.complete([], Sampling(max_tokens=1)) == []
    assert answerer.log_likelihoods([]) == []
    assert [one.num_tokens for one in answerer.log_likelihoods([("a", "")])] == [0]


def test_conversations_are_written_in_a_template(base: BaseModel, url: str) -> None:
    talk = [Message(role="user", content="why?"), Message(role="assistant", content="so"), Message(role="user", content="oh")]
    here = LocalAnswerer(base.model, base.tokenizer, template="chat")
    there = ServerAnswerer(Server(url), template="chat")
    assert here.complete([talk, "why?"], Sampling(max_tokens=9)) == there.complete([talk, "why?"], Sampling(max_tokens=9))
    texts: list[tuple[Prompt, str]] = [(talk, " because"), ("why?", "é")]
    for one, other in zip(here.log_likelihoods(texts), there.log_likelihoods(texts), strict=True):
        assert one.num_tokens == other.num_tokens > 0
        assert one.total == pytest.approx(other.total, abs=1e-4)
    plain = LocalAnswerer(base.model, base.tokenizer)
    assert plain.complete([talk], Sampling(max_tokens=9)) == ServerAnswerer(Server(url)).complete([talk], Sampling(max_tokens=9))


def test_what_exceeds_the_context_is_refused(answerer: Answerer) -> None:
    with pytest.raises(AnswerError, match="context"):
        answerer.complete(["x" * 510], Sampling(max_tokens=9))
    with pytest.raises(AnswerError, match="context"):
        answerer.log_likelihoods([("x" * 510, "x" * 9)])


def test_a_model_in_training_is_left_as_it_was(tiny_model: Path) -> None:
    own = load_base_model(str(tiny_model), torch.float32, ATTENTION)
    layers = wrap(own.model, ["q_proj"], Seeded(), 4, 8.0)
    own.model.train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    who = LocalAnswerer(own.model, own.tokenizer)
    who.complete(["a"], Sampling(max_tokens=3, temperature=1.0))
    who.log_likelihoods([("a", "b")])
    assert torch.equal(torch.rand(1), expected)
    assert own.model.training
    assert own.model.config._attn_implementation == ATTENTION
    assert all(parameter.requires_grad for layer in layers.values() for parameter in layer.b.parameters())


def test_batches_hold_texts_of_like_length() -> None:
    lengths = [3, 9, 1, 8, 30]
    found = list(like_lengths(lengths, 18))
    assert found == [[4], [1, 3], [0, 2]]
    assert list(like_lengths([], 18)) == []


def test_a_token_that_begins_in_the_prompt_s_last_space_counts() -> None:
    """The embedded model's tokenizer has " Paris" as one token: it was once counted as the prompt's."""
    base = load_base_model(None, torch.float32)
    who = LocalAnswerer(base.model, base.tokenizer)
    apart, together = who.log_likelihoods([("The capital of France is ", "Paris"), ("The capital of France is", " Paris")])
    assert apart.num_tokens == together.num_tokens == 1
    assert apart.total == pytest.approx(together.total, abs=1e-4)
