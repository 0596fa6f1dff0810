#!/usr/bin/env bash
# Writes what the demo adapters learn and leave alone into a folder: `bash training/demo/prepare.sh data runs`. `data` holds the
# sets that the adapters' cards name, as JSON Lines. About a quarter of an hour on two cores.
set -euo pipefail
data=$1 runs=$2
python=${PYTHON:-python}
here=$(dirname "$0")
mkdir -p "$runs"

source_of() { # path, and a Jinja template of the bare message; answers stay
    printf '{"path": "%s", "prompt": "%s", "completion": "{{ completion }}"}' "$1" "$2"
}
bare='{{ prompt[10:-8] }}' # what stands between "Customer: " and "\nIntent:", or "Question: " and "\nAnswer:"
bare_nlu='{{ prompt[10:] | replace(\"\\nAnswer (true or false):\", \" True or false?\") | replace(\"\\nAnswer:\", \"\") }}'
request='{{ (prompt[:1] | lower ~ prompt[1:]).rstrip(\".?\") }}' # to stand inside a sentence
chats() { "$python" -m training.chats "$@"; }
answer() { "$python" -m training.answer --threads 1 "$@"; }
lines() { "$python" -c 'import json, sys; [print(json.dumps({"prompt": line.strip()})) for line in sys.stdin]'; }

# Ordinary messages: the base model writes users' turns itself (Magpie, arXiv 2406.08464), and answers them.
"$python" - > "$runs/openings.jsonl" <<'PROGRAM'
import json
from lori.embedded import embedded_model
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(embedded_model())
opening = tokenizer.apply_chat_template([{"role": "user", "content": "\0"}], tokenize=False).partition("\0")[0]
for _ in range(900):
    print(json.dumps({"prompt": opening}))
PROGRAM
answer --data "$runs/openings.jsonl" --template plain --temperature 1 --max-tokens 60 --output "$runs/asked.jsonl"
lines < "$here/lookalikes.txt" > "$runs/lookalikes.jsonl"
ordinary="{\"path\": \"$runs/asked.jsonl\", \"prompt\": \"{{ completion }}\"}"
