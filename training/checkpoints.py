"""Complete checkpoints of a phase. A checkpoint that a kill cut off is never used."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lori.store.files import sync_folder, write_file
from training.processes import processes

logger = logging.getLogger(__name__)

# Where transformers cannot trust a file system's times it sorts checkpoints by number, as we want, but logs a warning.
logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "mtime" not in record.getMessage())

MARKER_FILE = "whole.json"
"""Marker of a complete checkpoint, written last: the sizes of the checkpoint's files in bytes, by name."""


class MarkComplete(TrainerCallback):
    """Marks each checkpoint as complete once all of its files are on disk, then calls `on_complete`."""

    def __init__(self, on_complete: Callable[[], None]) -> None:
        self.on_complete = on_complete

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:  # noqa: ARG002
        """Apply the save interval of `args`. The state of a resumed run still has the interval of the run before."""
        state.compute_steps(args, state.max_steps)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:  # noqa: ARG002
        """Write the marker. Trainer calls this after the last file of a checkpoint."""
        processes().wait_for_everyone()  # every process has then written its random state
        if not args.should_save:
            return
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.name != MARKER_FILE}
        for name in sizes:
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
        write_file(folder / MARKER_FILE, json.dumps(sizes).encode())
        sync_folder(folder)
        self.on_complete()


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in a phase's folder, or None. Warns of newer ones that are damaged."""
    marked = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{MARKER_FILE}")]
    for checkpoint in sorted(marked, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if not (damaged := _damaged_files(checkpoint)):
            return checkpoint
        logger.warning("%s is damaged (%s): going on from the one before, or the beginning", checkpoint, ", ".join(damaged))
    return None


def _damaged_files(checkpoint: Path) -> list[str]:
    try:
        sizes: dict[str, int] = json.loads((checkpoint / MARKER_FILE).read_bytes())
    except (OSError, ValueError) as error:
        return [f"{MARKER_FILE}: {error}"]
    files = {file.name: file.stat().st_size for file in checkpoint.iterdir() if file.is_file()}
    return [name for name, size in sizes.items() if files.get(name) != size]
