"""Which checkpoints of a phase are whole: what a kill cuts off is never taken for one."""

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

# Where it cannot trust a file system's times it sorts checkpoints by their numbers, which is what we want, and warns of it.
logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "mtime" not in record.getMessage())

WHOLE = "whole.json"
"""Written last in a checkpoint's folder: the sizes of its files, in bytes, by name."""


class MarkWhole(TrainerCallback):
    """Marks each checkpoint once all its files are on disk, and calls `note` then; they come as often as is said now."""

    def __init__(self, note: Callable[[], None]) -> None:
        self.note = note

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:  # noqa: ARG002
        """A resumed run has its checkpoint's state, with the interval that was asked for then."""
        state.compute_steps(args, state.max_steps)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:  # noqa: ARG002
        """Trainer calls it after the last file of a checkpoint."""
        processes().wait_for_everyone()  # each has written its random numbers' state
        if not args.should_save:
            return
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.name != WHOLE}
        for name in sizes:
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
        write_file(folder / WHOLE, json.dumps(sizes).encode())
        sync_folder(folder)
        self.note()


def last_whole(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a phase's folder, or None. Says which are not whole any more."""
    marked = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{WHOLE}")]
    for checkpoint in sorted(marked, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if not (damaged := _damaged(checkpoint)):
            return checkpoint
        logger.warning("%s is damaged (%s): going on from the one before, or the beginning", checkpoint, ", ".join(damaged))
    return None


def _damaged(checkpoint: Path) -> list[str]:
    try:
        sizes: dict[str, int] = json.loads((checkpoint / WHOLE).read_bytes())
    except (OSError, ValueError) as error:
        return [f"{WHOLE}: {error}"]
    files = {file.name: file.stat().st_size for file in checkpoint.iterdir() if file.is_file()}
    return [name for name, size in sizes.items() if files.get(name) != size]
