"""The options of `python -m training.evaluate`. Each default is written once, here."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, HttpUrl, ValidationError, model_validator

from lori.format import name_of
from lori.merge_options import DEFAULTS, MergeMethod, MergeOptions
from lori.names import AUTO, is_reference
from training.command_line import CommandLine
from training.data import Source
from training.data.row import fault_of
from training.evaluation.local_answerer import DEFAULT_BATCH_TOKENS
from training.evaluation.metrics import MetricName, MetricOptions

LOCAL_OPTIONS = ("model", "adapters", "batch_tokens", "dtype", "threads")
SERVER_OPTIONS = ("url", "concurrency", "api_key_variable")
GENERATIVE_METRICS = ("exact", "number", "refusal", "pass")
PASS_OPTIONS = ("execute_code", "num_answers", "pass_at", "temperature")


class EvaluateConfig(CommandLine):
    """Evaluate a base model, an adapter or a merge, through a running server or on a model that is loaded here."""

    data: str
    """The rows to evaluate on: a JSONL file, a data set's name, or a source as an object, as in `python -m training.fit`:
    `{"path": "openai/gsm8k", "name": "main", "split": "test", "prompt": "{{ question }}"}`."""
    metric: MetricName
    """loss: mean negative log-likelihood of the completions' tokens. exact: exact match of a greedy answer, cut to the number of
    lines of the completion. choice: accuracy of the likeliest of `choices` (`label` is the index of the right one), as a mean
    over the rows of each `task`, then over tasks. number: whether the last number of a greedy answer, or the number after `####`,
    is `answer`. refusal: fraction refused of the rows with `harmful` true and false. pass: pass@k of programs, by a row's `test`
    and `entry_point`."""
    adapter: list[str] = Field(default=[])
    """Names of adapters, through a server also of named merges, or auto alone: those that the server selects for each prompt.
    With --local and no --adapters, folders of adapters. If absent, the base is evaluated."""
    weights: list[Literal["auto"] | Annotated[float, Field(allow_inf_nan=False)]] = Field(default=[])
    """Weights in a merge, one for each adapter: a number, or through a server auto: from each prompt. A single auto is for all.
    1/n each if absent."""
    merge: MergeMethod = DEFAULTS.method
    """Method that merges several adapters; `linear` is the exact sum."""
    density: float = Field(default=DEFAULTS.density, gt=0, le=1)
    """Fraction of each adapter's nonzero entries that a merge keeps. For methods other than linear."""
    merge_seed: int = Field(default=DEFAULTS.seed, ge=0)
    """Seed for drawing the entries that dare_linear and dare_ties drop."""
    url: HttpUrl = HttpUrl("http://127.0.0.1:8000")
    """URL of the server."""
    api_key_variable: str = "LORI_API_KEY"
    """The environment variable with an API key of the server, if the server uses keys."""
    concurrency: int = Field(default=32, ge=1)
    """Number of concurrent requests."""
    local: bool = False
    """Loads the model here instead of asking a server."""
    model: str | None = None
    """The base model: a local folder or a hub id; the embedded model if absent. With --local."""
    adapters: Path | None = None
    """The folder of the adapters that --adapter names. With --local."""
    batch_tokens: int = Field(default=DEFAULT_BATCH_TOKENS, ge=1)
    """Tokens of a batch when texts are scored; four times as many when answers are generated. With --local."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of weights and matrix products. With --local."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 means as many as there are CPUs that other processes leave idle. With --local."""
    form: Literal["prompt", "messages"] = "prompt"
    """prompt: send the prompt as it is. messages: send the prompt as a user message in the adapters' own template."""
    num_rows: int = Field(default=0, ge=0)
    """Number of rows to use, drawn at random; 0 means all."""
    max_tokens: int = Field(default=0, ge=0)
    """Maximum tokens of an answer, for metrics that generate answers. 0 means 40 for refusal, 256 for number and pass, and for
    exact enough for the longest completion."""
    seed: int = Field(default=0, ge=0)
    """Seed for drawing the rows and sampling the answers."""
    execute_code: bool = False
    """Allows pass to run the programs that the model writes, within limits; see training/evaluation/sandbox.py."""
    num_answers: int = Field(default=1, ge=1)
    """Number of answers to each prompt. For pass."""
    pass_at: list[Annotated[int, Field(ge=1)]] = Field(default=[1], min_length=1)
    """Values of k for pass@k, the probability that one of k answers is right. Each gives a figure. For pass."""
    temperature: float = Field(default=0.0, ge=0)
    """1 samples from the model's own distribution, 0 is greedy. For pass."""
    record: Path | None = None
    """The folder of an adapter whose config and card get the result: of the base, of the adapter alone, or of a merge whose first
    adapter it is. The card then recommends the weights of the merge."""

    @property
    def source(self) -> Source:
        """The source of the rows."""
        return Source.model_validate_json(self.data) if self.data.startswith("{") else Source(path=self.data)

    @property
    def data_name(self) -> str:
        """Readable name of the data: a file, or a data set with its configuration, if one is given, and its split."""
        source = self.source
        return source.path if source.is_file else " ".join(filter(None, [source.path, source.name, source.split]))

    @property
    def merge_options(self) -> MergeOptions:
        """The options of the merge."""
        return MergeOptions(self.merge, self.density, DEFAULTS.sign, self.merge_seed)

    @property
    def all_weights(self) -> Sequence[Literal["auto"] | float]:
        """The weight of each adapter; 1/n each if no weights are given. Not for adapters that the server selects."""
        if self.weights == [AUTO]:
            return ["auto"] * len(self.adapter)
        return self.weights or [1 / len(self.adapter) for _ in self.adapter]

    @property
    def is_selected(self) -> bool:
        """Whether the server selects the adapters of each prompt."""
        return AUTO in self.adapter

    @property
    def is_automatic(self) -> bool:
        """Whether the server computes weights from each prompt."""
        return self.is_selected or AUTO in self.weights

    @property
    def options(self) -> MetricOptions:
        """The options of the metric."""
        return MetricOptions(self.max_tokens, self.num_answers, tuple(self.pass_at), self.temperature, self.seed)

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        faults = [*self._data_faults(), *self._unused_options(), *self._adapter_faults(), *self._metric_faults()]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _data_faults(self) -> Iterator[str]:
        try:
            _ = self.source
        except ValidationError as error:
            yield f"--data: {fault_of(error)[1]}"

    def _unused_options(self) -> Iterator[str]:
        given = self.model_fields_set
        for names, is_used, reason in (
            (LOCAL_OPTIONS, self.local, "needs --local"),
            (SERVER_OPTIONS, not self.local, "is for a server, which --local does not ask"),
            (PASS_OPTIONS, self.metric == "pass", "is for --metric pass"),
            (("max_tokens",), self.metric in GENERATIVE_METRICS, f"is for metrics of answers: {', '.join(GENERATIVE_METRICS)}"),
        ):
            yield from (f"--{name.replace('_', '-')} {reason}" for name in names if name in given and not is_used)

    def _adapter_faults(self) -> Iterator[str]:
        given = self.model_fields_set
        if self.weights and (not self.adapter or len(self.all_weights) != len(self.adapter)):
            yield f"--weights has {len(self.weights)} weights for {len(self.adapter)} adapters, expected one for each"
        if self.is_selected and (len(self.adapter) > 1 or self.weights):
            yield f"--adapter {AUTO} lets the server select adapters and weights, expected no other --adapter and no --weights"
        if self.is_automatic and (unused := [flag for flag in ("local", "record") if getattr(self, flag)]):
            yield f"--{unused[0]} is for adapters and weights that are the same for all prompts, found {AUTO}"
        if self.is_automatic and self.merge != "linear":
            yield f"--merge {self.merge} is for given weights, found {AUTO}"
        if len(set(self.adapter)) != len(self.adapter):
            yield "--adapter names one twice"
        if not self.local and (wrong := [name for name in self.adapter if name != AUTO and not is_reference(name)]):
            yield f"--adapter {wrong[0]} is no name: a folder is measured with --local"
        if self.record and self.adapter and name_of(self.record) not in {name_of(Path(name)) for name in self.adapter}:
            yield f"--record {self.record} takes figures of {name_of(self.record)}, and --adapter names {', '.join(self.adapter)}"
        if self.adapters and not self.adapters.is_dir():
            yield f"--adapters {self.adapters} is no folder"
        if self.merge != "linear" and not self.adapter:
            yield f"--merge {self.merge} needs --adapter"
        if "density" in given and self.merge == "linear":
            yield "--density is for a --merge that is no sum"
        if "merge_seed" in given and not self.merge_options.is_random:
            yield "--merge-seed is for --merge dare_linear and dare_ties"

    def _metric_faults(self) -> Iterator[str]:
        if self.form == "messages" and self.metric == "pass":
            yield "--form messages is not for pass, which takes a program as it stands"
        if self.metric == "pass" and not self.execute_code:
            yield "--metric pass runs programs that the model writes: allow it with --execute-code"
        if max(self.pass_at) > self.num_answers:
            yield f"--pass-at is {max(self.pass_at)}, expected at most --num-answers, {self.num_answers}"
        if self.num_answers > 1 and not self.temperature:
            yield "--num-answers above 1 needs a --temperature above 0: greedy answers are all alike"
