"""Ray Serve's choice of a replica for a request, by the adapters that it names. Knows Ray; the choice itself is in `affinity`."""

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from server.cluster.affinity import ANY, LoadBound, preferred

PATIENCE_S = 2.0
"""How long a replica may take to say what it has under way: within Ray's 0.1 s one that computes a step may not, and would lose
requests of its adapters to others."""


class AdapterRouter(RequestRouter):
    """Sends a request, whose `key` is an argument of the call, to the replica that `preferred` names first and that takes it.

    Each process that sends requests has one, with its own count of what is under way; all rank the replicas alike.
    """

    queue_len_response_deadline_s = max_queue_len_response_deadline_s = PATIENCE_S

    def initialize_state(self, share: float, floor: int) -> None:  # type: ignore[override]  # Ray passes what is configured
        """Takes what the deployment is configured with."""
        self._bound = LoadBound(share, floor)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Returns the replicas one by one, in the order in which they should be tried."""
        by_id = {str(replica.replica_id.unique_id): replica for replica in candidate_replicas}
        key = ANY
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # where all are full, else they would be asked without a pause
            key = pending_request.kwargs.get("key", ANY)
        loads = {name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in by_id.items()}
        return [[by_id[name]] for name in preferred(key, loads, self._bound)]
