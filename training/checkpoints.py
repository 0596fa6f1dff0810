"""Which checkpoints of a phase are whole: what a kill cuts off is never taken for one."""

import logging
import os
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lori.durable import sync_folder, write_file
from training.processes import processes

# Where it cannot trust a file system's times it sorts checkpoints by their numbers, which is what we want, and warns of it.
logging.getLogger("transformers.trainer_utils").addFilter(lambda record: "mtime" not in record.getMessage())

WHOLE = "whole"
"""An empty file that is written last in a checkpoint's folder."""


class MarkWhole(TrainerCallback):
    """Marks each checkpoint once all its files are on disk."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:  # noqa: ARG002
        """Trainer calls it after the last file of a checkpoint."""
        processes().wait_for_everyone()  # each has written its random numbers' state
        if not args.should_save:
            return
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        for file in folder.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        write_file(folder / WHOLE, b"")
        sync_folder(folder)


def last_whole(folder: Path) -> Path | None:
    """Returns the newest whole checkpoint of a phase's folder, or None."""
    found = {int(path.parent.name.rpartition("-")[2]): path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{WHOLE}")}
    return found[max(found)] if found else None
