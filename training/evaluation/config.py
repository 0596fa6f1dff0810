"""Everything that `python -m training.evaluate` can be told, each default written once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, HttpUrl, ValidationError, model_validator

from lori.format import name_of
from lori.merge_options import DEFAULTS, MergeMethod, MergeOptions
from training.command_line import CommandLine
from training.data import Source
from training.data.row import fault_of
from training.evaluation.local_answerer import DEFAULT_BATCH_TOKENS
from training.evaluation.metrics import MetricName, Options

LOCAL = ("model", "adapters", "batch_tokens", "dtype", "threads")
SERVED = ("url", "concurrency", "api_key_variable")
ANSWERED = ("exact", "number", "refusal", "pass")
PASS = ("execute_code", "num_answers", "pass_at", "temperature")


class EvaluateConfig(CommandLine):
    """Measures a base, an adapter or a merge, through a running server or on a model that is loaded here."""

    data: str
    """What to measure on: a JSONL file, a data set's name, or a source as an object, as `python -m training.fit` takes it:
    `{"path": "openai/gsm8k", "name": "main", "split": "test", "prompt": "{{ question }}"}`."""
    metric: MetricName
    """loss: mean negative log-likelihood of the completions' tokens. exact: the completion, greedily, as many lines as it has.
    choice: the right one of `choices` (its place is `label`) by log-likelihood, a mean over each row's `task`. number: the last
    number of a greedy answer, or the one after `####`, is `answer`. refusal: how many rows with `harmful` true and false are
    refused. pass: pass@k of programs, by a row's `test` and `entry_point`."""
    adapter: list[str] = Field(default=[])
    """Names of adapters, or folders of adapters with --local and no --adapters; none is the base."""
    weights: list[Annotated[float, Field(allow_inf_nan=False)]] = Field(default=[])
    """One for each adapter; none is 1/n each."""
    merge: MergeMethod = DEFAULTS.method
    """How several adapters become one: `linear` is the exact sum."""
    density: float = Field(default=DEFAULTS.density, gt=0, le=1)
    """The share of each adapter's kept entries that survives in a merge that is no sum."""
    merge_seed: int = Field(default=DEFAULTS.seed, ge=0)
    """Draws the entries that dare_linear and dare_ties drop."""
    url: HttpUrl = HttpUrl("http://127.0.0.1:8000")
    """The server."""
    api_key_variable: str = "LORI_API_KEY"
    """The variable of the environment that holds a key of the server, where it has keys."""
    concurrency: int = Field(default=32, ge=1)
    """Requests under way together."""
    local: bool = False
    """Loads the model here, and asks no server."""
    model: str | None = None
    """The base model: a local folder or a hub id; the embedded model if absent. With --local."""
    adapters: Path | None = None
    """The folder in which adapters are found by name. With --local."""
    batch_tokens: int = Field(default=DEFAULT_BATCH_TOKENS, ge=1)
    """Tokens that are scored together; four times as many where answers are generated. With --local."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Weights and products. With --local."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 is as many as there are CPUs that other processes leave free. With --local."""
    form: Literal["prompt", "messages"] = "prompt"
    """Sends the prompt as it stands, or as a user's message in the adapters' own template."""
    num_rows: int = Field(default=0, ge=0)
    """Rows drawn at random; 0 is all."""
    max_tokens: int = Field(default=0, ge=0)
    """Longest answer, where one is generated; 0 is 40 for refusal, 256 for number and pass, and for exact what the longest
    completion may take."""
    seed: int = Field(default=0, ge=0)
    """Draws the rows and the answers."""
    execute_code: bool = False
    """Lets pass run the programs that the model writes, within limits, see training/evaluation/sandbox.py."""
    num_answers: int = Field(default=1, ge=1)
    """Answers to each prompt. For pass."""
    pass_at: list[Annotated[int, Field(ge=1)]] = Field(default=[1], min_length=1)
    """The k of pass@k: one of so many answers must be right. Each is a figure. For pass."""
    temperature: float = Field(default=0.0, ge=0)
    """1 draws answers from the model as it is, 0 is greedy. For pass."""
    record: Path | None = None
    """An adapter's folder whose config and card take the result: of the base, of the adapter alone, or of a merge that begins
    with it, whose weights the card then recommends."""

    @property
    def source(self) -> Source:
        """Where the rows come from."""
        return Source.model_validate_json(self.data) if self.data.startswith("{") else Source(path=self.data)

    @property
    def data_name(self) -> str:
        """What was measured on, for a person: a file, or a data set with its configuration, if one was said, and its split."""
        source = self.source
        return source.path if source.is_file else " ".join(filter(None, [source.path, source.name, source.split]))

    @property
    def merge_options(self) -> MergeOptions:
        """How adapters are merged."""
        return MergeOptions(self.merge, self.density, DEFAULTS.sign, self.merge_seed)

    @property
    def all_weights(self) -> list[float]:
        """The weight of each adapter."""
        return self.weights or [1 / len(self.adapter) for _ in self.adapter]

    @property
    def options(self) -> Options:
        """How answers are made."""
        return Options(self.max_tokens, self.num_answers, tuple(self.pass_at), self.temperature, self.seed)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        faults = [*self._data_faults(), *self._out_of_place(), *self._adapter_faults(), *self._metric_faults()]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _data_faults(self) -> Iterator[str]:
        try:
            _ = self.source
        except ValidationError as error:
            yield f"--data: {fault_of(error)[1]}"

    def _out_of_place(self) -> Iterator[str]:
        given = self.model_fields_set
        for names, is_theirs, whose in (
            (LOCAL, self.local, "needs --local"),
            (SERVED, not self.local, "is for a server, which --local does not ask"),
            (PASS, self.metric == "pass", "is for --metric pass"),
            (("max_tokens",), self.metric in ANSWERED, f"is for metrics of answers: {', '.join(ANSWERED)}"),
        ):
            yield from (f"--{name.replace('_', '-')} {whose}" for name in names if name in given and not is_theirs)

    def _adapter_faults(self) -> Iterator[str]:
        given = self.model_fields_set
        if self.weights and len(self.weights) != len(self.adapter):
            yield f"--weights has {len(self.weights)} numbers for {len(self.adapter)} adapters, expected one for each"
        if len(set(self.adapter)) != len(self.adapter):
            yield "--adapter names one twice"
        if not self.local and (folders := [name for name in self.adapter if "/" in name]):
            yield f"--adapter {folders[0]} is no name: a folder is measured with --local"
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
