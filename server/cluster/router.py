"""Ray Serve's choice of a replica for a request, by the adapters that it names. Knows Ray; the choice itself is in `affinity`."""

import time

from ray.serve._private.common import ReplicaID
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from server.affinity import ANY, LoadBound, preferred

PATIENCE_S = 2.0
"""Seconds that a replica may take to report its requests under way. Within Ray's 0.1 s a replica that computes a step may not
answer, and would lose requests for its adapters to others."""
AVOIDED_S = 5.0
"""Seconds for which a replica that did not answer is tried last: each try makes a request wait for `PATIENCE_S`."""
Probed = list[tuple[RunningReplica, int | None]]
"""Replicas, with their requests under way; None for a replica that did not answer."""


class AdapterRouter(RequestRouter):
    """Ray's request router: sends a request to the first replica of `preferred` that accepts it.

    The request's `key` is an argument of the call. Each process that sends requests has a router, with its own counts of requests
    under way. All rank the replicas alike.
    """

    queue_len_response_deadline_s = max_queue_len_response_deadline_s = PATIENCE_S

    def initialize_state(self, share: float, floor: int) -> None:  # type: ignore[override]  # Ray passes what is configured
        """Set the parameters of the deployment's configuration."""
        self._bound = LoadBound(share, floor)
        self._silent = dict[ReplicaID, float]()

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """Note that a replica cannot be reached. Ray has no load for it then, so it would be tried first."""
        super().on_replica_actor_unavailable(replica_id)
        self._silent[replica_id] = time.monotonic()

    async def _probe_queue_lens(self, replicas: list[RunningReplica], backoff_index: int) -> Probed:
        # Ray does not note a replica that only does not answer.
        probed: Probed = await super()._probe_queue_lens(replicas, backoff_index)
        now = time.monotonic()
        self._silent |= {replica.replica_id: now for replica, number in probed if number is None}
        return probed

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas one by one, in the order in which they should be tried."""
        by_id = {str(replica.replica_id.unique_id): replica for replica in candidate_replicas}
        key = ANY
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # if all are full: otherwise without a pause
            key = pending_request.kwargs.get("key", ANY)
        loads = {name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in by_id.items()}
        order = preferred(key, loads, self._bound)
        if self._silent:
            oldest = time.monotonic() - AVOIDED_S
            self._silent = {replica: since for replica, since in self._silent.items() if since > oldest}
            order = sorted(order, key=lambda name: by_id[name].replica_id in self._silent)
        return [[by_id[name]] for name in order]
