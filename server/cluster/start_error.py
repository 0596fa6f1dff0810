"""Why a cluster does not start."""


class StartError(Exception):
    """Ray, a replica or an ingress cannot start, and why."""
