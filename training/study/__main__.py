"""`python -m training.study`: reruns the method's claims at small scale, and writes tables and plots of what came out."""

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from lori.errors import LoriError
from lori.store.files import replace_file
from training.base import load_base
from training.command_line import ended
from training.study.claims import CLAIMS, Found
from training.study.config import Claim, StudyConfig
from training.study.lab import Lab, StudyError

logger = logging.getLogger(__name__)


def page_writer() -> Callable[[StudyConfig, Mapping[Claim, Sequence[Sequence[Found]]]], Path]:
    """Return what writes the page. Raises `LoriError` where matplotlib is not installed: before the training, not after."""
    try:
        from training.study.page import write_page  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise LoriError(f"a study needs: pip install '.[train]' ({error})") from error
    return write_page


def study(config: StudyConfig) -> Mapping[Claim, list[list[Found]]]:
    """Train and measures what is not there yet; returns what each claim found, by seed. Raises `LoriError`."""
    _open(config)
    base = load_base(config.model, config.dtype, config.threads)
    labs = [Lab(config, base, seed) for seed in config.seeds]
    return {claim: [_found(lab, claim) for lab in labs] for claim in config.claims}


def _found(lab: Lab, claim: Claim) -> list[Found]:
    """Return what a claim finds with one seed. Written down whole, so that its adapters need not be kept, or moved, with it."""
    file = lab.folder / f"{claim}.json"
    options = lab.config.options_of(claim)
    if file.is_file():
        kept = json.loads(file.read_text())
        if not (other := [name for name in options if options[name] != kept["options"].get(name)]):
            return [Found(**one) for one in kept["found"]]
        logger.info("seed %d: %s was found with other %s, and is again", lab.seed, claim, ", ".join(other))
    found = list(CLAIMS[claim](lab))
    replace_file(file, json.dumps({"options": options, "found": [asdict(one) for one in found]}, indent=1).encode())
    return found


def _open(config: StudyConfig) -> None:
    """Write down the options of a new output; raises `StudyError` where what is there was made with others."""
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

    return ended(program, "interrupted: the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
