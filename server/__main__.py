"""`python -m server`: serves the embedded model and the demo adapters, or what its flags say."""

import logging
import signal
import sys
from types import FrameType

import uvicorn
from pydantic import ValidationError

from lori.errors import LoriError
from lori.flags import flag_faults
from server.app import create_app
from server.loading import load_service
from server.settings import Settings

DRAIN_S = 30


def main() -> int:
    """Runs the server until SIGTERM or SIGINT; running requests may end first. Returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    # uvicorn drains on these signals, then raises them again for whoever had them before: for us that is a clean end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    try:
        settings = Settings(_cli_parse_args=True)
        service = load_service(settings)
    except ValidationError as error:
        print(f"error: {flag_faults(error)}", file=sys.stderr)
        return 2
    except LoriError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    uvicorn.run(
        create_app(service),
        host=settings.host,
        port=settings.port,
        log_level="info",
        timeout_graceful_shutdown=DRAIN_S,
    )
    return 0


def _end(_: int, __: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
