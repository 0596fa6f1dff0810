"""`python -m tests.server.open_admin`: the server with its usual flags, in which every caller is an admin."""

import logging

from server.access.caller import Caller
from server.app import create_app
from server.http_server import DrainingServer, http_config
from server.loading import load_service
from server.routes.dependencies import get_caller
from server.settings import Settings


def main() -> None:
    """Serve until the process is killed."""
    logging.basicConfig(level=logging.INFO)
    settings = Settings(_cli_parse_args=True)
    service = load_service(settings)
    app = create_app(service)
    app.dependency_overrides[get_caller] = lambda: Caller(is_admin=True)
    DrainingServer(http_config(app, settings), service).run()


if __name__ == "__main__":
    main()
