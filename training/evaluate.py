"""`python -m training.evaluate`: measures a base, an adapter or a merge on rows it was not trained on.

Through a running server it sees what a client sees; with --local it computes the same on a model of its own.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lori.format import name_of, read_config
from lori.template import Template
from training.base import load_base
from training.ending import ended
from training.evaluation.answerer import AnswerError
from training.evaluation.config import EvaluateConfig
from training.evaluation.figures import STDERR, Figures
from training.evaluation.local_adapters import Choice, applied, common_template, find_adapter
from training.evaluation.local_answerer import LocalAnswerer
from training.evaluation.metrics import measure, read_measured
from training.evaluation.record import record
from training.evaluation.server import Server
from training.evaluation.server_answerer import ServerAnswerer

logger = logging.getLogger(__name__)


def served(config: EvaluateConfig) -> ServerAnswerer:
    """Returns the server as an answerer, with the adapters that `config` names."""
    choice: dict[str, Any] = {"adapter": config.adapter} if config.adapter else {}
    choice |= {"weights": config.weights} if config.weights else {}
    if config.adapter:
        names = {"method": "merge", "density": "density", "seed": "merge_seed"}
        choice |= {names[option]: value for option, value in config.merge_options.used.items() if option in names}
    server = Server(str(config.url), config.concurrency, os.environ.get(config.api_key_variable))
    found = {name: server.adapter(name) for name in config.adapter}
    for name, adapter in found.items():
        _check_form(config, name, adapter.templates)
        if config.record and name.partition("@")[0] == name_of(config.record):
            _check_version(config.record, adapter.version)
    learnt = {name: adapter.templates for name, adapter in found.items()}
    return ServerAnswerer(server, choice, common_template(learnt) if config.form == "messages" else "plain")


@contextmanager
def loaded(config: EvaluateConfig) -> Iterator[LocalAnswerer]:
    """Gives a model of our own as an answerer, with the adapters that `config` names applied to it."""
    base = load_base(config.model, config.dtype, config.threads)
    adapters = [find_adapter(reference, config.adapters, base.identity) for reference in config.adapter]
    for adapter in adapters:
        _check_form(config, adapter.name, adapter.config.lori.templates)
    choice = Choice(adapters, config.weights, config.merge_options)
    template = choice.template() if config.form == "messages" else "plain"
    with applied(base.model, choice.merged()):
        yield LocalAnswerer(base.model, base.tokenizer, template, config.batch_tokens)


def _check_form(config: EvaluateConfig, name: str, learnt: Sequence[Template]) -> None:
    if config.form == "prompt" and "plain" not in learnt:
        said = "%s was trained on the template %s alone, and is measured on prompts as they stand"
        logger.warning(said, name, ", ".join(learnt))


def _check_version(folder: Path, served: str) -> None:
    own = read_config(folder).lori.content_digest[: len(served)]
    if own != served:
        said = f"the server has version {served} of {name_of(folder)}, and --record {folder} is {own}"
        raise AnswerError(f"{said}: start the server again, or let an admin load it (POST /adapters/{name_of(folder)}/load)")


def evaluate(config: EvaluateConfig) -> Figures:
    """Measures and returns the figures. Raises `LoriError` where a row, an adapter or the server does not play along."""
    rows = read_measured(config.data, config.metric, config.num_rows, config.seed)
    if not config.local:
        return measure(config.metric, served(config), rows, config.options)
    with loaded(config) as answerer:
        return measure(config.metric, answerer, rows, config.options)


def show(figures: Figures) -> str:
    """Returns a line for each figure, its standard error beside it."""
    lines = []
    for name, value in figures.items():
        if name == "rows":
            lines.append(f"{name:40} {value:.0f}")
        elif not name.endswith(STDERR):
            error = figures.get(name + STDERR)
            lines.append(f"{name:40} {value:.4f}" + (f" ± {error:.4f}" if error is not None else ""))
    return "\n".join(lines)


def main() -> int:
    """Runs the program and returns its exit code."""
    config = EvaluateConfig.from_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    def program() -> str:
        if config.record:
            read_config(config.record)  # what is wrong with it is said before the measurement
        figures = evaluate(config)
        if config.record:
            record(config.record, config, figures)
        return show(figures)

    return ended(program)


if __name__ == "__main__":
    sys.exit(main())
