"""Flags of vLLM, TGI, LoRAX, SGLang and llama.cpp's server, and their replacements here.

Flags that this server has, too, are not listed. tests/server/migration/test_tables.py checks that every flag in a text exists.
"""

from lori.flags import STRAY

MODEL = "use --model, with a folder or a hub id"
CONTEXT = "the context is the model's own, as far as --kv-cache-gib has room for it: leave it out"
MEMORY = "memory is given in GiB: --kv-cache-gib is that of keys and values, --resident-gib that of adapters in use"
ONE_DEVICE = "a model runs on one device, which --device names; `python -m server.cluster --replicas N` serves more requests"
REPLICAS = "`python -m server.cluster --replicas N` runs several replicas"
ADAPTERS = "put the adapters into a folder, and pass --adapters FOLDER; `python -m lori import SOURCE FOLDER` brings PEFT's there"
KEYS = "use --keys FILE; `python -m server.keys FILE --tenant NAME` makes a key"
BATCH = "use --max-batch"
STEP = "use --max-step-tokens"
RESIDENT = "use --max-resident, and --resident-gib for their memory"
HUB_LOGIN = "log in with `hf auth login`, or set the variable HF_TOKEN"
HUB_CACHE = "set the variable HF_HOME"
CORS = "use --cors-origins"
LOG = "each request is one line of the log, see --log-format; --log-prompts adds prompts and answers: leave it out"
TLS = "terminate TLS in a reverse proxy in front of the server"
IN_REQUESTS = "each request says that itself: leave it out"
ALWAYS = "it is always so: leave it out"
NOTHING = "it is not supported: leave it out"

FLAGS: dict[str, str] = {
    STRAY: "the base model is given as --model NAME",
    # the model and its names
    **dict.fromkeys(("-m", "-hf", "-hfr", "--hf-repo", "--model-id", "--model-path", "--model-name", "--source"), MODEL),
    **dict.fromkeys(("--base-model", "--checkpoint"), MODEL),
    **dict.fromkeys(("-mu", "--model-url"), f"{MODEL}: no address is fetched"),
    **dict.fromkeys(
        ("-a", "--alias", "--served-model-name"),
        "the base model is called by its hub id, or by the last part of its folder's path: link to the folder by another name",
    ),
    **dict.fromkeys(("--tokenizer", "--tokenizer-path"), "the tokenizer is the model's own: leave it out"),
    **dict.fromkeys(
        ("--revision", "--code-revision", "--tokenizer-revision"),
        "fetch it with `hf download ID --revision REVISION --local-dir FOLDER`, and pass --model FOLDER",
    ),
    "--trust-remote-code": "no model's own code is ever run: leave it out",
    **dict.fromkeys(("--hf-token", "-hft", "--token", "--predibase-api-token"), HUB_LOGIN),
    **dict.fromkeys(("--download-dir", "--huggingface-hub-cache", "--hf-cache-dir"), HUB_CACHE),
    # adapters
    "--enable-lora": "adapters are always on: leave it out, and pass their folder with --adapters FOLDER",
    **dict.fromkeys(("--lora", "--lora-modules", "--lora-adapters", "--lora-paths", "--lora-scaled", "--lora-dir"), ADAPTERS),
    **dict.fromkeys(("--adapter-id", "--adapter-ids", "--preloaded-adapter-ids", "--static-adapter"), ADAPTERS),
    "--adapter-source": "--adapters takes a folder, or an address such as s3://bucket/adapters; --hub lets an admin load others",
    **dict.fromkeys(("--max-loras", "--max-loras-per-batch", "--max-active-adapters"), RESIDENT),
    **dict.fromkeys(("--max-cpu-loras", "--max-loaded-loras"), "use --loaded-gib, the memory of adapters that wait to be used"),
    "--max-lora-rank": "use --max-rank",
    "--adapter-memory-fraction": "use --resident-gib",
    **dict.fromkeys(
        ("--fully-sharded-loras", "--lora-dtype", "--lora-extra-vocab-size", "--lora-init-without-apply", "--lora-backend"),
        NOTHING,
    ),
    "--adapter-cycle-time-s": NOTHING,
    # context, memory and devices
    **dict.fromkeys(("-c", "--ctx-size", "--context-length", "--max-model-len", "--max-total-tokens"), CONTEXT),
    **dict.fromkeys(("--max-input-tokens", "--max-input-length", "--max-seq-len", "--max-seq-len-to-capture"), CONTEXT),
    **dict.fromkeys(("--gpu-memory-utilization", "--cuda-memory-fraction", "--mem-fraction-static"), MEMORY),
    **dict.fromkeys(("--kv-cache-memory-bytes", "--num-gpu-blocks-override", "--max-kv-size"), "use --kv-cache-gib"),
    **dict.fromkeys(("-tp", "--tp", "--tp-size", "--tensor-parallel-size", "--num-shard", "--sharded"), ONE_DEVICE),
    **dict.fromkeys(("-pp", "--pp", "--pp-size", "--pipeline-parallel-size", "--tensor-split", "--split-mode"), ONE_DEVICE),
    **dict.fromkeys(("-ngl", "--n-gpu-layers", "--gpu-layers", "--cpu-offload-gb"), "all layers run on --device"),
    **dict.fromkeys(("-mg", "--main-gpu", "--device-id"), "use --device cuda:N"),
    **dict.fromkeys(("-dp", "--dp", "--dp-size", "--data-parallel-size", "--workers", "--api-server-count"), REPLICAS),
    "--swap-space": "preempted requests are recomputed, not swapped: leave it out",
    **dict.fromkeys(("-t", "--num-threads", "--threads-batch", "-tb"), "use --threads"),
    **dict.fromkeys(("-q", "--quantize", "--load-in-8bit"), "use --quantization int8"),
    **dict.fromkeys(("--load-in-4bit", "--load-format"), NOTHING),
    **dict.fromkeys(
        ("--kv-cache-dtype", "--cache-type-k", "--cache-type-v", "-ctk", "-ctv"),
        "the KV cache has the dtype of --dtype: leave it out",
    ),
    # batches and steps
    **dict.fromkeys(("-np", "--parallel", "--max-num-seqs", "--max-batch-size", "--max-running-requests"), BATCH),
    **dict.fromkeys(("-b", "-ub", "--batch-size", "--ubatch-size", "--max-num-batched-tokens", "--chunked-prefill-size"), STEP),
    **dict.fromkeys(("--max-batch-prefill-tokens", "--max-batch-total-tokens", "--max-prefill-tokens"), STEP),
    **dict.fromkeys(("--max-concurrent-requests", "--max-queue-size"), "use --max-requests"),
    **dict.fromkeys(("--enable-prefix-caching", "--enable-chunked-prefill", "--cont-batching", "-cb", "--cache-prompt"), ALWAYS),
    **dict.fromkeys(("--no-enable-prefix-caching", "--disable-radix-cache", "--enforce-eager", "--flash-attn", "-fa"), NOTHING),
    "--scheduling-policy": "each request may have a 'priority', as far as its key allows: leave it out",
    **dict.fromkeys(("--waiting-served-ratio", "--max-best-of", "--max-stop-sequences"), NOTHING),
    **dict.fromkeys(("--speculative-config", "--speculative-model", "--num-speculative-tokens", "--speculate"), NOTHING),
    **dict.fromkeys(
        ("-md", "--model-draft", "--mlock", "--no-mmap", "--numa", "--max-logprobs", "--max-client-batch-size"), NOTHING
    ),
    **dict.fromkeys(
        ("-to", "--timeout"), "use --max-request-s for a whole request, --max-unread-s for a client that reads nothing"
    ),
    # requests
    **dict.fromkeys(("-n", "--predict", "--n-predict", "--max-new-tokens", "--temp", "--temperature", "--top-p"), IN_REQUESTS),
    **dict.fromkeys(
        ("-s", "--seed", "--top-k", "--repeat-penalty", "--generation-config", "--override-generation-config"), IN_REQUESTS
    ),
    **dict.fromkeys(
        ("--chat-template", "--chat-template-file", "--jinja"), "the chat template is that of the model's tokenizer: leave it out"
    ),
    **dict.fromkeys(("--enable-auto-tool-choice", "--tool-call-parser", "--reasoning-parser", "--reasoning-format"), NOTHING),
    **dict.fromkeys(("--embedding", "--embeddings", "--reranking", "--mmproj", "--guided-decoding-backend"), NOTHING),
    # the network, keys and logs
    **dict.fromkeys(("--api-key", "--api-keys", "--api-key-file"), KEYS),
    **dict.fromkeys(("-H", "--hostname", "--listen", "--bind", "--ip"), "use --host"),
    **dict.fromkeys(("-p", "--http-port"), "use --port"),
    **dict.fromkeys(("--allowed-origins", "--cors-allow-origin", "--cors-allowed-origins"), CORS),
    **dict.fromkeys(("--ssl-keyfile", "--ssl-certfile", "--ssl-key-file", "--ssl-cert-file", "--ssl-ca-certs"), TLS),
    **dict.fromkeys(("--log-level", "--uvicorn-log-level", "-v", "--verbose", "--log-file", "--log-requests"), LOG),
    **dict.fromkeys(("--disable-log-requests", "--disable-log-stats", "--enable-log-requests"), LOG),
    "--json-output": "use --log-format json",
    "--otlp-endpoint": "use --otlp-traces-endpoint",
    **dict.fromkeys(("--metrics", "--enable-metrics", "--slots", "--props"), "GET /metrics is always there: leave it out"),
    "--config": "each flag is an environment variable, too: LORI_PORT=8000",
}
"""Hints by the other server's flag, with dashes; also llama.cpp's short flags."""
