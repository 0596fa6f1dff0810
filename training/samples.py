"""Samples: a model's answers to a few prompts before and after training."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from lori.template import Template
from training.data import Row
from training.evaluation.answerer import Sampling
from training.evaluation.local_answerer import LocalAnswerer
from training.methods import TrainingMethod

NUM_SAMPLES, MAX_TOKENS = 4, 64


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, the answer in the data, and the answers of the base (`before`) and the trained model (`after`)."""

    prompt: str
    expected: str
    before: str
    after: str


def take_samples(method: TrainingMethod, rows: Sequence[Row], template: Template) -> list[Sample]:
    """Return greedy answers to the first `NUM_SAMPLES` of `rows` that are valid under `template` and leave room for an answer.

    All processes must call this, since the model may be sharded over them.
    """
    answerer = LocalAnswerer(method.base.model, method.base.tokenizer, template)
    fitting = (row for row in rows if row.template in (None, template) and answerer.has_room(row.prompt, MAX_TOKENS))
    rows = list(islice(fitting, NUM_SAMPLES))
    prompts = [row.prompt for row in rows]
    after = answerer.complete(prompts, Sampling(MAX_TOKENS))
    with method.adapter_disabled():
        before = answerer.complete(prompts, Sampling(MAX_TOKENS))
    expected = [row.answer_text for row in rows]
    answers = zip(rows, expected, before, after, strict=True)
    return [Sample(row.prompt_text, text, base_answer, answer) for row, text, [base_answer], [answer] in answers]
