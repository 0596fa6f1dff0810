"""`python -m training.evaluate`: evaluation of a base model, an adapter or a merge on held-out rows.

It asks a running server, as a client would, or with --local computes the same on a model that it loads itself.
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
from lori.named_merge import weights_text
from lori.names import AUTO
from lori.template import Template, common_template
from training.base import load_base
from training.command_line import run_program
from training.evaluation.answerer import AnswerError
from training.evaluation.config import EvaluateConfig
from training.evaluation.local_adapters import AdapterSelection, apply_adapter, find_adapter
from training.evaluation.local_answerer import LocalAnswerer
from training.evaluation.measurement import MeasuredAdapter, Measurement, record_measurement
from training.evaluation.metrics import measure, read_metric_rows
from training.evaluation.server_answerer import ServedAdapter, Server, ServerAnswerer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Subject:
    """The model that is evaluated: a base, with or without adapters."""

    answerer: ServerAnswerer | LocalAnswerer
    base: str
    adapters: Sequence[MeasuredAdapter]
    base_digest: str | None = None
    """Digest of the base's weights; None for a server's base."""


def server_subject(config: EvaluateConfig) -> Subject:
    """Return the server's model with the adapters that `config` names."""
    server = Server(str(config.url), config.concurrency, os.environ.get(config.api_key_variable))
    base = f"the server at {config.url}"
    if config.is_selected:
        template: Template = "chat" if config.form == "messages" else "plain"
        return Subject(ServerAnswerer(server, {"adapter": AUTO}, None, template, is_automatic=True), base, ())
    selection: dict[str, Any] = {}
    if config.adapter:
        selection = {"adapter": config.adapter, "weights": config.all_weights}
        names = {"method": "merge", "density": "density", "seed": "merge_seed"}
        selection |= {names[option]: value for option, value in config.merge_options.used.items() if option in names}
    adapters_by_name = {name: server.adapters(name) for name in config.adapter}
    templates_by_name = {
        adapter.reference if adapter.merge_weights else name: adapter.templates
        for name, adapters in adapters_by_name.items()
        for adapter in adapters
    }
    if config.is_automatic and (merges := [name for name, (first, *_) in adapters_by_name.items() if first.merge_weights]):
        raise AnswerError(f"--weights has {AUTO}, and {merges[0]} is a named merge: expected adapters")
    versions = [adapter.version for adapters in adapters_by_name.values() for adapter in adapters]
    template = _template(config, templates_by_name)
    answerer = ServerAnswerer(server, selection, versions, template, is_automatic=config.is_automatic)
    measured_adapters = [_measured_adapter(name.partition("@")[0], adapters) for name, adapters in adapters_by_name.items()]
    return Subject(answerer, base, measured_adapters)


def _measured_adapter(name: str, adapters: Sequence[ServedAdapter]) -> MeasuredAdapter:
    """Return the adapter `name`, or the merge of this name if `adapters` are parts of one."""
    if not adapters[0].merge_weights:
        return MeasuredAdapter(name, adapters[0].version)
    terms = [f"{weights_text(adapter.merge_weights)} {adapter.reference}" for adapter in adapters]
    return MeasuredAdapter(name, "", terms)


@contextmanager
def local_subject(config: EvaluateConfig) -> Iterator[Subject]:
    """Context manager of a model that is loaded here, with the adapters that `config` names applied to it."""
    base = load_base(config.model, config.dtype, config.threads)
    adapters = [find_adapter(reference, config.adapters, base.identity) for reference in config.adapter]
    templates_by_name = {
        reference: adapter.config.lori.templates for reference, adapter in zip(config.adapter, adapters, strict=True)
    }
    template = _template(config, templates_by_name)
    weights = [weight for weight in config.weights if weight != "auto"]  # with --local none is
    with apply_adapter(base.model, AdapterSelection(adapters, weights, config.merge_options).merged()):
        answerer = LocalAnswerer(base.model, base.tokenizer, template, config.batch_tokens)
        measured_adapters = [MeasuredAdapter(adapter.name, adapter.version) for adapter in adapters]
        yield Subject(answerer, base.name, measured_adapters, base.identity.digest)


def _template(config: EvaluateConfig, templates_by_name: Mapping[str, Sequence[Template]]) -> Template:
    """Return the template for the prompts, given the templates that each adapter was trained on.

    Warns if prompts are sent as they are ("plain") to an adapter that was not trained on plain prompts.
    """
    if config.form == "messages":
        return common_template(list(templates_by_name.items()))
    for name, templates in templates_by_name.items():
        if "plain" not in templates:
            message = "%s was trained on the template %s alone, and is measured on prompts as they stand"
            logger.warning(message, name, ", ".join(templates))
    return "plain"


def evaluate(config: EvaluateConfig) -> Measurement:
    """Measure and return the figures. Raises `LoriError` for bad rows, unknown or unsound adapters, and server errors."""
    rows = read_metric_rows(config.source, config.metric, config.num_rows, config.seed)
    with local_subject(config) if config.local else nullcontext(server_subject(config)) as subject:
        if config.record:
            _check_record(config.record, subject)
        figures = measure(config.metric, subject.answerer, rows, config.options)
        if config.record:
            _check_record(config.record, subject)  # the adapter may have been retrained during the measurement
        return Measurement(config, subject.base, subject.adapters, subject.answerer.template, figures)


def _check_record(folder: Path, subject: Subject) -> None:
    """Raise `AnswerError` if the adapter in `folder` is of another base or version than `subject`."""
    name, record = name_of(folder), read_config(folder).lori
    digest = record.content_digest
    if subject.base_digest not in (None, record.base_digest):
        raise AnswerError(f"--record {folder} is an adapter of another base than {subject.base}, which would be measured")
    for adapter in subject.adapters:
        if adapter.terms:
            raise AnswerError(f"{adapter.label} is a named merge, whose figures cannot be recorded: expected adapters")
        if adapter.name == name and not digest.startswith(adapter.version):
            version = digest[: len(adapter.version)]
            raise AnswerError(
                f"{adapter.version} of {name} would be measured, and --record {folder} is {version}: publish that, start the "
                f"server again, or let an admin load it (POST /adapters/{name}/load)"
            )


def main() -> int:
    """Run the program and return its exit code."""
    config = EvaluateConfig.from_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    def program() -> str:
        if config.record:
            read_config(config.record)  # raises for an unsound adapter before the measurement
        measurement = evaluate(config)
        if config.record:
            record_measurement(config.record, measurement)
        return "\n".join(measurement.lines)

    return run_program(program)


if __name__ == "__main__":
    sys.exit(main())
