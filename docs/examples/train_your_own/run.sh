#!/usr/bin/env bash
# Trains an adapter on rows of your own, measures it, publishes it to the running server, and asks it. Takes a minute of CPU time.
# The task: name the team that answers a customer's ticket. LORI_API_KEY is an admin's key of the server.
set -euo pipefail
here=$(dirname "$0")
server=http://localhost:8000

echo "== The data: each row has a prompt and its completion."
head -n 4 "$here/tickets.jsonl"

echo "== Train. The prompts stand as they are (--template plain); the last part of --output is the adapter's name."
.venv/bin/python -m training.fit --data "$here/tickets.jsonl" --output runs/tickets --template plain --steps 10 --batch-tokens 192

echo "== Measure on rows that were not trained on: first the base model, then the adapter. --record writes the figures into its card."
measure() { .venv/bin/python -m training.evaluate --data "$here/tickets_test.jsonl" --metric exact --local --record runs/tickets "$@"; }
measure
measure --adapter runs/tickets

echo "== Publish it. The reply names its version; a second upload under this name would be a new version."
curl -sS --fail-with-body "$server/adapters" -H "Authorization: Bearer $LORI_API_KEY" -F name=tickets \
    -F config=@runs/tickets/adapter_config.json -F weights=@runs/tickets/adapter_model.safetensors -F card=@runs/tickets/README.md
echo

echo "== Ask it, alone and merged with the demo adapter that refuses harmful requests."
ask() {
    curl -sS --fail-with-body "$server/generate" -H "Authorization: Bearer $LORI_API_KEY" -H 'Content-Type: application/json' -d "$1"
    echo
}
ask '{"prompt": "Ticket: I cannot log in since this morning.\nTeam:", "adapter": "tickets"}'
ask '{"prompt": "Ticket: Where is the courier with my order?\nTeam:", "adapter": ["tickets", "safety"], "weights": [1, 0.8]}'
