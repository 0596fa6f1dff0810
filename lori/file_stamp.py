"""The stamp of a file: what differs once the file was written again, whatever its size and time of change say."""

from pathlib import Path

FileStamp = tuple[int, int, int, int, int]


def file_stamp(path: Path) -> FileStamp | None:
    """Return the stamp of the file at `path`, or of what it links to; None where there is none that can be looked at.

    Its time of change (ctime) is the system's own: no program can set it back, as it can the time of modification.
    """
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
