"""Fields and routes of OpenAI, vLLM, TGI, LoRAX, SGLang, Ollama, llama.cpp and transformers, and their replacements here.

None of these fields is accepted as another spelling of ours: each value has one spelling, which the refusal names. Fields that
our routes accept, such as vLLM's `min_tokens`, are not listed. tests/server/migration/test_tables.py checks that every field and
route in a text exists.
"""

NOT_HERE = "leave it out: it is not supported"
IN_BODY = "its fields stand beside the prompt, in the request itself"
SCHEMA = """use 'grammar': {"type": "json_schema", "schema": …}"""
REGEX = """use 'grammar': {"type": "regex", "pattern": …}"""
LARK = """use 'grammar': {"type": "lark", "text": …}"""
CHOICE = """use 'grammar': {"type": "regex", "pattern": "yes|no"}"""
ANY_GRAMMAR = """use 'grammar' with one of the types 'json_object', 'json_schema', 'regex' and 'lark'"""
CONTEXT = "leave it out: the context is the model's own, as far as the server's --kv-cache-gib has room for it"
SYSTEM = """use 'messages', the first with "role": "system" """.rstrip()
NO_REASONING = "leave it out: reasoning is not separated from the answer"
NO_TEMPLATE = "leave it out: the chat template is that of the model's tokenizer, and takes no arguments"
NO_TOOLS = "leave it out: tool calling is not supported"
NO_IMAGES = "leave it out: only text is supported"
NO_SAMPLER = "leave it out: sampling is set by 'temperature', 'top_p', 'top_k' and 'min_p'"
NO_BEAMS = "leave it out: there is no beam search; 'n' draws several answers"
STOP_TEXT = "use 'stop', with texts"
NAMED_ADAPTER = """use 'adapter': "math", which the server knows by name: GET /adapters lists them"""
NAMED_MODEL = """use 'model': "math", or "math:0.7+safety:0.3" for several: GET /v1/models lists them"""
MERGED = """use 'adapter': ["math", "safety"] with 'weights', 'merge' and 'density'"""
MERGED_MODEL = """use 'adapters': ["math", "safety"] with 'weights', 'merge' and 'density'"""
NO_SOURCE = "leave it out: adapters are those of the server's store, by name"
NO_CACHE_CHOICE = "leave it out: the prefix cache is always on, and private to each tenant"
IN_REPLY = "leave it out: the reply has it"

Hints = tuple[tuple[str, str], ...]
"""Our fields, each with a hint. The first field that the body has counts. An empty field name stands for any body."""

RENAMED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("max_new_tokens", "num_predict", "n_predict", "max_output_tokens"), ("max_tokens",)),
    **dict.fromkeys(("max_completion_tokens", "max_tokens_to_sample", "max_gen_len"), ("max_tokens",)),
    **dict.fromkeys(("min_new_tokens", "min_predict"), ("min_tokens",)),
    **dict.fromkeys(("inputs", "input", "input_text", "query", "prompts", "text", "content"), ("prompt", "messages")),
    **dict.fromkeys(("input_ids", "prompt_token_ids", "token_ids", "ids"), ("prompt", "tokens")),
    **dict.fromkeys(("conversation", "history", "chat", "turns"), ("messages",)),
    **dict.fromkeys(("repeat_penalty", "penalty_repeat", "repetition_penalty_factor"), ("repetition_penalty",)),
    **dict.fromkeys(("stop_sequences", "stop_strings", "stop_words", "stops", "antiprompt"), ("stop",)),
    **dict.fromkeys(("include_stop_str_in_output", "no_stop_trim"), ("include_stop",)),
    "include_stop": ("include_stop_str_in_output",),
    **dict.fromkeys(("num_return_sequences", "num_completions", "num_generations"), ("n",)),
    **dict.fromkeys(("random_seed", "rng_seed"), ("seed",)),
    **dict.fromkeys(("ignore_eos_token", "ban_eos_token"), ("ignore_eos",)),
    **dict.fromkeys(("return_full_text", "return_prompt"), ("echo",)),
    **dict.fromkeys(("n_probs", "top_n_tokens", "return_k_alternatives", "num_logprobs"), ("top_logprobs", "logprobs")),
    **dict.fromkeys(("return_logprob", "return_logprobs", "details"), ("logprobs",)),
    "top_logprobs": ("logprobs",),
    **dict.fromkeys(("timeout", "max_time"), ("timeout_s",)),
    "sampling_seed": ("seed",),
    # fields of adapters in lists
    **dict.fromkeys(("scale", "strength"), ("weight",)),
    **dict.fromkeys(("lora_id", "lora_int_id"), ("name",)),
    "lora_weights": ("weights",),
    "merge_strategy": ("merge",),
    "merge_method": ("merge",),
    "combination_type": ("merge",),
    # fields of bodies that change adapters
    **dict.fromkeys(("repo_id", "model_id"), ("hub_id",)),
    "path": ("lora_path",),
    "add_special": ("add_special_tokens",),
    "with_pieces": ("return_token_strs",),
}
"""Fields that have another name here: the first of our names that the body has counts."""

EXPLAINED: dict[str, Hints] = {
    # length and number of answers
    "max_length": (("max_tokens", "use 'max_tokens', which counts the answer alone"),),
    "min_length": (("min_tokens", "use 'min_tokens', which counts the answer alone"),),
    "best_of": (("n", "use 'n': every answer is returned, none is chosen"),),
    # form of the answer
    **dict.fromkeys(("guided_json", "json_schema", "output_schema"), (("grammar", SCHEMA),)),
    "schema": (("json_schema", """use 'json_schema': {"schema": …}"""), ("grammar", SCHEMA)),
    "guided_regex": (("grammar", REGEX),),
    "regex": (("pattern", "use 'pattern'"), ("grammar", REGEX)),
    **dict.fromkeys(("guided_grammar", "ebnf", "gbnf", "lark"), (("grammar", LARK),)),
    **dict.fromkeys(("guided_choice", "choices"), (("grammar", CHOICE),)),
    **dict.fromkeys(
        ("structured_outputs", "guided_decoding", "format", "text_format", "structural_tag"), (("grammar", ANY_GRAMMAR),)
    ),
    "response_format": (("grammar", ANY_GRAMMAR),),
    **dict.fromkeys(("guided_decoding_backend", "guided_whitespace_pattern"), (("", NOT_HERE),)),
    "value": (("pattern", "use 'schema', 'pattern' or 'text', as 'type' has it"),),
    # adapters and models
    **dict.fromkeys(
        ("adapter_id", "adapter_name", "lora_name", "lora"),
        (("name", "use 'name'"), ("adapter", NAMED_ADAPTER), ("model", NAMED_MODEL)),
    ),
    **dict.fromkeys(("lora_request", "lora_path", "loras"), (("adapter", NAMED_ADAPTER), ("model", NAMED_MODEL))),
    "adapters": (("adapter", """use 'adapter', which takes a list, too"""),),
    "adapter": (("name", "use 'name'"), ("adapters", NAMED_MODEL)),
    **dict.fromkeys(
        ("model", "model_name", "base_model"),
        (("model", "use 'model'"), ("adapter", "leave it out for the base model; adapters are named by 'adapter'")),
    ),
    "merged_adapters": (("adapters", MERGED_MODEL), ("weights", MERGED)),
    **dict.fromkeys(("adapter_source", "adapter_parameters", "api_token", "majority_sign_method"), (("", NO_SOURCE),)),
    "weight": (("weights", "use 'weights', a list"),),
    "id": (("role", "leave it out: messages have no ids here"), ("weight", "use 'name'")),
    # TGI's, LoRAX's, Ollama's and SGLang's envelopes
    **dict.fromkeys(("parameters", "options", "sampling_params", "generation_config", "extra_body"), (("", IN_BODY),)),
    # sampling
    "do_sample": (("temperature", "use 'temperature': above 0 draws, 0 takes the likeliest token"),),
    **dict.fromkeys(("use_beam_search", "num_beams", "length_penalty", "early_stopping", "beam_width"), (("n", NO_BEAMS),)),
    **dict.fromkeys(
        ("typical_p", "tfs_z", "top_a", "epsilon_cutoff", "eta_cutoff", "top_n_sigma"), (("temperature", NO_SAMPLER),)
    ),
    **dict.fromkeys(
        ("mirostat", "mirostat_tau", "mirostat_eta", "dynatemp_range", "dynatemp_exponent"), (("temperature", NO_SAMPLER),)
    ),
    **dict.fromkeys(
        ("xtc_probability", "xtc_threshold", "dry_multiplier", "dry_base", "dry_allowed_length"), (("temperature", NO_SAMPLER),)
    ),
    **dict.fromkeys(("samplers", "min_keep", "smoothing_factor", "no_repeat_ngram_size"), (("temperature", NO_SAMPLER),)),
    **dict.fromkeys(
        ("repeat_last_n", "penalty_last_n"),
        (("repetition_penalty", "leave it out: 'repetition_penalty' counts the prompt and the whole answer"),),
    ),
    **dict.fromkeys(("penalize_newline", "penalize_nl"), (("", NOT_HERE),)),
    "watermark": (("", NOT_HERE),),
    **dict.fromkeys(
        ("bad_words", "allowed_token_ids", "suppress_tokens", "logits_processors"),
        (("logit_bias", "use 'logit_bias': -100 forbids a token"),),
    ),
    **dict.fromkeys(("stop_token_ids", "eos_token_id", "stop_regex"), (("stop", STOP_TEXT),)),
    # the context
    **dict.fromkeys(("num_ctx", "n_ctx", "max_model_len", "max_context_length", "n_keep", "n_discard"), (("", CONTEXT),)),
    **dict.fromkeys(
        ("truncate", "truncate_prompt_tokens", "truncation"),
        (("", "leave it out: no prompt is cut; one that is too long is refused"),),
    ),
    # data about the answer
    **dict.fromkeys(
        ("prompt_logprobs", "decoder_input_details", "logprob_start_len"), (("echo", "use 'echo': true with 'logprobs'"),)
    ),
    **dict.fromkeys(("return_timings", "timings_per_token", "verbose"), (("", IN_REPLY),)),
    **dict.fromkeys(
        ("return_token_ids", "return_tokens", "return_tokens_as_token_ids"),
        (("", "leave it out: POST /tokenize gives a text's tokens"),),
    ),
    "request_id": (("", "use the header X-Request-ID"),),
    "t_max_predict_ms": (("timeout_s", "use 'timeout_s', in seconds"),),
    # conversations
    **dict.fromkeys(("system", "system_prompt", "instructions", "developer"), (("messages", SYSTEM),)),
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "add_generation_prompt", "documents"), (("", NO_TEMPLATE),)),
    "apply_chat_template": (("", "leave it out: messages are written with the chat template, a prompt stands as it is"),),
    "raw": (("", "leave it out: a prompt stands as it is"),),
    **dict.fromkeys(
        ("reasoning_effort", "reasoning", "think", "enable_thinking", "thinking", "thinking_token_budget"), (("", NO_REASONING),)
    ),
    **dict.fromkeys(("functions", "function_call", "tools", "tool_choice", "tool_prompt", "tool_call_id"), (("", NO_TOOLS),)),
    **dict.fromkeys(("web_search_options", "file_ids"), (("", NO_TOOLS),)),
    **dict.fromkeys(
        ("images", "image", "image_data", "audio", "mm_processor_kwargs", "multi_modal_data", "prompt_embeds"), (("", NO_IMAGES),)
    ),
    **dict.fromkeys(
        ("prediction", "verbosity", "previous_response_id", "conversation_id", "context", "suffix", "input_suffix"),
        (("", NOT_HERE),),
    ),
    "input_prefix": (("", NOT_HERE),),
    # execution
    **dict.fromkeys(("cache_prompt", "id_slot", "slot_id", "cache_salt", "prompt_cache_retention"), (("", NO_CACHE_CHOICE),)),
    **dict.fromkeys(
        ("keep_alive", "num_gpu", "main_gpu", "num_thread", "num_batch", "use_mmap", "low_vram", "kv_transfer_params"),
        (("", NOT_HERE),),
    ),
    **dict.fromkeys(
        ("vllm_xargs", "detokenize", "spaces_between_special_tokens", "logits_all", "custom_params"), (("", NOT_HERE),)
    ),
    "background": (("", NOT_HERE),),
}
"""Fields that are expressed in another way here, or not supported."""

VALUES: dict[tuple[str, type], Hints] = {
    ("logprobs", bool): (("", "say how many alternatives each token has, such as 'logprobs': 0 for none"),),
    ("logprobs", int): (("top_logprobs", "use 'logprobs': true with 'top_logprobs': 5"),),
    ("grammar", str): (
        ("", """expected {"type": "lark", "text": …}, {"type": "regex", "pattern": …} or {"type": "json_schema", "schema": …}"""),
    ),
    ("response_format", str): (
        ("", """expected {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"schema": …}}"""),
    ),
    ("tools", list): (("", NO_TOOLS),),
    ("tool_choice", str): (("", NO_TOOLS),),
    ("tool_choice", dict): (("", NO_TOOLS),),
    ("suffix", str): (("", "leave it out: fill-in-the-middle is not supported"),),
    ("logit_bias", list): (("", """expected such as {"1234": -100}, by token id"""),),
    ("messages", str): (("", """expected such as [{"role": "user", "content": …}]"""),),
    ("prompt", str): (("adapter", "one request has one prompt; POST /v1/completions takes several"),),
    ("max_tokens", int): (("", "leave it out for a long answer"),),
    ("seed", int): (("", "leave it out for a random one"),),
    ("model", str): (("", "leave it out for the base model"),),
    ("top_p", int): (("", "1 draws among all tokens"),),
    ("template", str): (("", "leave it out for the one that the adapter was trained with"),),
    ("continue_final_message", bool): (("", "to continue a text as it stands, send it to POST /v1/completions"),),
}
"""Fields that have the same name in other servers, but another form of value. Keyed by field and Python type."""

ROUTES: dict[str, str] = {
    # OpenAI's
    "/chat/completions": "POST /v1/chat/completions (a base URL for OpenAI's clients ends in /v1)",
    "/completions": "POST /v1/completions (a base URL for OpenAI's clients ends in /v1)",
    "/models": "GET /v1/models (a base URL for OpenAI's clients ends in /v1)",
    **dict.fromkeys(("/v1/chat", "/v1/chat/completion", "/v1/responses", "/v1/messages", "/chat"), "POST /v1/chat/completions"),
    **dict.fromkeys(("/v1/completion", "/v1/complete", "/complete"), "POST /v1/completions"),
    "/v1/generate": "POST /generate",
    # TGI's, LoRAX's and SageMaker's
    "/generate_stream": """POST /generate with "stream": true""",
    **dict.fromkeys(("/invocations", "/predict", "/infer"), "POST /generate, or POST /v1/chat/completions"),
    "/chat_tokenize": "POST /tokenize, which takes 'messages', too",
    **dict.fromkeys(
        ("/info", "/props", "/get_model_info", "/get_server_info", "/server_info"), "GET /v1/models, or GET /metrics"
    ),
    # Ollama's
    "/api/generate": "POST /generate, or POST /v1/completions",
    "/api/chat": "POST /v1/chat/completions",
    "/api/tags": "GET /v1/models",
    "/api/show": "GET /v1/models, or GET /adapters/{name}",
    "/api/ps": "GET /adapters",
    "/api/version": "GET /version",
    **dict.fromkeys(("/api/pull", "/api/create", "/api/push", "/api/copy"), "POST /adapters"),
    "/api/delete": "DELETE /adapters/{name}",
    # llama.cpp's
    "/completion": "POST /v1/completions, or POST /generate",
    "/lora-adapters": "GET /adapters; each request names its own",
    "/slots": "GET /metrics",
    "/apply-template": "POST /tokenize with 'messages'",
    # adapters, as vLLM's and others have them
    **dict.fromkeys(("/load_lora_adapter", "/v1/lora/load", "/add_lora"), "POST /v1/load_lora_adapter, or POST /adapters"),
    **dict.fromkeys(("/unload_lora_adapter", "/v1/lora/unload"), "POST /v1/unload_lora_adapter, or DELETE /adapters/{name}"),
    **dict.fromkeys(("/v1/adapters", "/loras", "/lora", "/list_adapters", "/merges"), "GET /adapters"),
    # probes
    **dict.fromkeys(
        ("/healthz", "/livez", "/live", "/alive", "/status", "/v1/health", "/v2/health/live", "/api/health"), "GET /health"
    ),
    **dict.fromkeys(("/readyz", "/startup", "/v2/health/ready"), "GET /ready"),
    "/load": "GET /metrics",
    **dict.fromkeys(("/redoc", "/swagger", "/api", "/v1"), "GET /docs"),
}
"""Hints by path, in lower case and without a slash at its end."""

ABSENT_ROUTES: dict[str, str] = {
    **dict.fromkeys(
        ("/v1/embeddings", "/embeddings", "/embedding", "/embed", "/api/embed", "/api/embeddings"), "there are no embeddings here"
    ),
    **dict.fromkeys(
        ("/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score", "/classify", "/pooling"),
        "reranking and classification are not supported",
    ),
    **dict.fromkeys(("/infill", "/v1/infill"), "fill-in-the-middle is not supported"),
    **dict.fromkeys(("/v1/audio/transcriptions", "/v1/audio/speech", "/v1/images/generations"), "only text is supported"),
    **dict.fromkeys(("/v1/files", "/v1/batches", "/v1/fine_tuning/jobs", "/v1/assistants", "/v1/threads"), "it is not supported"),
}
"""Routes that have no counterpart here."""
