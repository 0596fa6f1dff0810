"""`python -m training.study`: tests of the method's claims at small scale, with tables and plots of the results."""

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from lori.errors import LoriError
from lori.store.files import replace_file
from training.base import load_base
from training.command_line import run_program
from training.study.claims import CLAIMS, Result
from training.study.config import Claim, StudyConfig
from training.study.lab import Lab, StudyError

logger = logging.getLogger(__name__)


def page_writer() -> Callable[[StudyConfig, Mapping[Claim, Sequence[Sequence[Result]]]], Path]:
    """Return `write_page`. Raises `LoriError` if matplotlib is not installed; call it before the training, not after."""
    try:
        from training.study.page import write_page  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise LoriError(f"a study needs: pip install '.[train]' ({error})") from error
    return write_page


def study(config: StudyConfig) -> Mapping[Claim, list[list[Result]]]:
    """Train and measure what does not exist yet. Return the results of each claim, one list for each seed. Raises `LoriError`."""
    _open(config)
    base = load_base(config.model, config.dtype, config.threads)
    labs = [Lab(config, base, seed) for seed in config.seeds]
    return {claim: [_results(lab, claim) for lab in labs] for claim in config.claims}


def _results(lab: Lab, claim: Claim) -> list[Result]:
    """Return the results of a claim with one seed.

    They are saved in a file of their own, so the claim's adapters and measurements need not be kept.
    """
    file = lab.folder / f"{claim}.json"
    options = lab.config.options_of(claim)
    if file.is_file():
        saved = json.loads(file.read_text())
        if not (differing := [name for name in options if options[name] != saved["options"].get(name)]):
            return [Result(**fields) for fields in saved["found"]]
        logger.info("seed %d: %s was found with other %s, and is again", lab.seed, claim, ", ".join(differing))
    results = list(CLAIMS[claim](lab))
    replace_file(file, json.dumps({"options": options, "found": [asdict(result) for result in results]}).encode())
    return results


def _open(config: StudyConfig) -> None:
    """Write the options of a new output. Raises `StudyError` if an existing output has other options."""
    config.output.mkdir(parents=True, exist_ok=True)
    file = config.output / "options.json"
    if not file.is_file():
        replace_file(file, config.identity.encode())
    elif file.read_text() != config.identity:
        raise StudyError(f"{config.output} is of a study with other options, see {file}: name another --output")


def main() -> int:
    """Run the program and return its exit code."""
    config = StudyConfig.from_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def program() -> str:
        write_page = page_writer()
        return f"wrote {write_page(config, study(config))}"

    return run_program(program, "interrupted: the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
