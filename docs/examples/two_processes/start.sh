#!/usr/bin/env bash
# Starts two servers on one store, and vllm-router before them on port 8000. Ctrl+C ends all three, and so does the end of one.
set -euo pipefail
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT

# Waits for an address to answer. Ends the script if fewer than `$2` of its processes still run.
wait_for() {
    until curl -sf -o /dev/null "$1"; do
        [[ $(jobs -rp | wc -l) == "$2" ]] || exit 1
        sleep 1
    done
}

# One thread each, for a machine with two cores: without --threads both servers would start a thread for every core.
for port in 8001 8002; do
    .venv/bin/python -m server --port "$port" --threads 1 --adapters adapters --keys keys.toml &
done
wait_for http://localhost:8001/ready 2
wait_for http://localhost:8002/ready 2

# Requests with the same X-Session-ID go to the same server. A server that is about to end says so at /ready.
RUST_LOG=warn .venv/bin/vllm-router --port=8000 --worker-urls http://localhost:8001 http://localhost:8002 \
    --policy=consistent_hash --health-check-endpoint=/ready --health-check-interval-secs=1 --health-failure-threshold=1 &
wait_for http://localhost:8000/readiness 3
echo "ready on http://localhost:8000, before http://localhost:8001 and http://localhost:8002"
wait -n
