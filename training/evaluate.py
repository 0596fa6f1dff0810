"""`python -m training.evaluate`: measures a base, an adapter or a merge on rows it was not trained on.

Through a running server it sees what a client sees; with --local it computes the same on a model of its own.
"""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lori.format import name_of, read_config
from lori.template import Template, common_template
from training.base import load_base
from training.command_line import ended
from training.evaluation.answerer import AnswerError
from training.evaluation.config import EvaluateConfig
from training.evaluation.local_adapters import Choice, applied, find_adapter
from training.evaluation.local_answerer import LocalAnswerer
from training.evaluation.measurement import Adapted, Measurement, record
from training.evaluation.metrics import measure, read_measured
from training.evaluation.server_answerer import Server, ServerAnswerer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Subject:
    """Who is measured, and what it is."""

    answerer: ServerAnswerer | LocalAnswerer
    base: str
    adapters: Sequence[Adapted]
    base_digest: str | None = None
    """Of the base's weights, where they are at hand."""


def served(config: EvaluateConfig) -> Subject:
    """Return the server as an answerer, with the adapters that `config` names."""
    choice: dict[str, Any] = {"adapter": config.adapter} if config.adapter else {}
    choice |= {"weights": config.weights} if config.weights else {}
    if config.adapter:
        names = {"method": "merge", "density": "density", "seed": "merge_seed"}
        choice |= {names[option]: value for option, value in config.merge_options.used.items() if option in names}
    server = Server(str(config.url), config.concurrency, os.environ.get(config.api_key_variable))
    found = {name: server.adapter(name) for name in config.adapter}
    learnt = {name: adapter.templates for name, adapter in found.items()}
    adapters = [Adapted(name.partition("@")[0], adapter.version) for name, adapter in found.items()]
    answerer = ServerAnswerer(server, choice, [adapter.version for adapter in adapters], _template(config, learnt))
    return Subject(answerer, f"the server at {config.url}", adapters)


@contextmanager
def loaded(config: EvaluateConfig) -> Iterator[Subject]:
    """Give a model of our own as an answerer, with the adapters that `config` names applied to it."""
    base = load_base(config.model, config.dtype, config.threads)
    adapters = [find_adapter(reference, config.adapters, base.identity) for reference in config.adapter]
    learnt = {reference: adapter.config.lori.templates for reference, adapter in zip(config.adapter, adapters, strict=True)}
    template = _template(config, learnt)
    with applied(base.model, Choice(adapters, config.weights, config.merge_options).merged()):
        answerer = LocalAnswerer(base.model, base.tokenizer, template, config.batch_tokens)
        adapted = [Adapted(adapter.name, adapter.version) for adapter in adapters]
        yield Subject(answerer, base.name, adapted, base.identity.digest)


def _template(config: EvaluateConfig, learnt: Mapping[str, Sequence[Template]]) -> Template:
    """Return how prompts are written for adapters, by name, that were trained on these; says where that is new to one."""
    if config.form == "messages":
        return common_template(list(learnt.items()))
    for name, templates in learnt.items():
        if "plain" not in templates:
            said = "%s was trained on the template %s alone, and is measured on prompts as they stand"
            logger.warning(said, name, ", ".join(templates))
    return "plain"


def evaluate(config: EvaluateConfig) -> Measurement:
    """Measure, and returns what was found. Raises `LoriError` where a row, an adapter or the server does not play along."""
    rows = read_measured(config.source, config.metric, config.num_rows, config.seed)
    with loaded(config) if config.local else nullcontext(served(config)) as subject:
        if config.record:
            _check_record(config.record, subject)
        figures = measure(config.metric, subject.answerer, rows, config.options)
        if config.record:
            _check_record(config.record, subject)  # it may have been trained anew meanwhile
        return Measurement(config, subject.base, subject.adapters, subject.answerer.template, figures)


def _check_record(folder: Path, subject: Subject) -> None:
    name, record = name_of(folder), read_config(folder).lori
    digest = record.content_digest
    if subject.base_digest not in (None, record.base_digest):
        raise AnswerError(f"--record {folder} is an adapter of another base than {subject.base}, which would be measured")
    for adapter in subject.adapters:
        if adapter.name == name and not digest.startswith(adapter.version):
            own = digest[: len(adapter.version)]
            raise AnswerError(
                f"{adapter.version} of {name} would be measured, and --record {folder} is {own}: publish that, start the server "
                f"again, or let an admin load it (POST /adapters/{name}/load)"
            )


def main() -> int:
    """Run the program and return its exit code."""
    config = EvaluateConfig.from_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    def program() -> str:
        if config.record:
            read_config(config.record)  # what is wrong with it is said before the measurement
        measurement = evaluate(config)
        if config.record:
            record(config.record, measurement)
        return "\n".join(measurement.lines)

    return ended(program)


if __name__ == "__main__":
    sys.exit(main())
