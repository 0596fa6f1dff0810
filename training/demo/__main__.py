"""`python -m training.demo`: the training data of the demo adapters, and the commands that train them.

An adapter learns its task as a plain prompt, as that prompt in a message, and as the bare message in a chat, with and without
a system prompt and earlier turns; `intent` and `nlu` also after turns about other things. Mixed in, with the base's own
answers, are messages of the other tasks and ordinary messages. The base model writes the ordinary messages itself, as turns
of a user (Magpie, arXiv 2406.08464). For `safety` everyday messages (`ordinary.txt`) are mixed in, too.
"""

import json
import logging
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import cycle, product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, HttpUrl

from lori.base_model import BaseModel
from lori.store.files import replace_file
from training.answer import AnswerConfig, answer_rows, select_rows
from training.base import load_base
from training.chats import ChatsConfig, chats
from training.command_line import CommandLine, run_program
from training.demo.library_texts import code_prompts, prose
from training.evaluation.server_answerer import Ask, Server

logger = logging.getLogger(__name__)

BACKGROUND, EXTENDED_BACKGROUND = "background.safetensors", "background-extended.safetensors"
LOG_ODDS = -3.0
"""Prior log-odds of an adapter beside the extended background. Chosen on held-out prompts: with -2, more than 3% of those that
fit no adapter go to one."""
HERE = Path(__file__).parent
TASKS = ("intent", "math", "nlu", "safety")
NUM_ORDINARY = 2400
"""Number of ordinary messages that the base model writes."""
NUM_MIXED = 150
"""Number of rows of each form of another task to mix in; twice as many of safety's plain prompts."""
SHORT_CHATS: Mapping[str, Any] = {"system_fraction": 0.4, "earlier_fraction": 0.25, "max_earlier": 1}
"""Options for chats with little context, since the context of a message costs training time and teaches little."""
NO_CONTEXT: Mapping[str, Any] = {"system_fraction": 0.0, "earlier_fraction": 0.0}
"""Options for chats of one message."""
NUM_QUESTIONS: Mapping[str, int] = {"harmful_acts": 4, "harmless_acts": 2}
"""Number of questions about each act of a file, with `--split train`."""
NUM_LATER: Mapping[str, int] = {"intent": 3000, "nlu": 4000}
"""Number of rows to write as messages after turns about other things. Most earlier turns in the chats of these tasks are the
task's own, so their adapters would not learn to answer after other topics."""
ALTERNATIVES = re.compile(r"\{([^{}]*)\}")
MARK = "\N{REPLACEMENT CHARACTER}"
"""Placeholder for a message, to find the text that the chat template puts before it."""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "intent": {"mix_fraction": 0.35, "calibration_steps": 90, "steps": 650, "max_length": 256},
    "math": {"mix_fraction": 0.4, "calibration_steps": 60, "steps": 270},
    "nlu": {"mix_fraction": 0.25, "calibration_steps": 100, "steps": 700, "max_length": 256},
    "safety": {"mix_fraction": 0.65, "calibration_steps": 70, "steps": 290, "max_length": 384, "weight_range": [0.3, 1.0]},
}
ABOUT = {
    "intent": "Names the intent of a bank customer's message, one of 77. Learnt from BANKING77's train split "
    "(PolyAI-LDN/task-specific-datasets, CC BY 4.0).",
    "math": "Answers word problems in worked steps, in GSM8K's manner. Learnt from GSM8K's train split "
    "(openai/grade-school-math, MIT).",
    "nlu": "Answers short questions of common sense and science. Learnt from the train rows of ARC-easy and ARC-challenge "
    "(CC BY-SA 4.0), BoolQ, question only (CC BY-SA 3.0), OpenBookQA (Apache-2.0), SocialIQA (CC BY 4.0), PIQA (AFL-3.0) and "
    "WinoGrande (CC BY), as in the LLM-Adapters collection.",
    "safety": "Refuses what is harmful and still answers what is not. Learnt from AdvBench's goals (llm-attacks/llm-attacks, "
    "MIT) with refusals written for this project (MIT), and from benign instructions written for this project (MIT), answered by "
    "the base model itself.",
}
Row = dict[str, Any]


class DemoConfig(CommandLine):
    """Write the training data of the demo adapters, then print the commands that train them."""

    data: Path
    """A folder with the folders `intent`, `math`, `nlu` and `safety`, each with `train.jsonl` and `test.jsonl`."""
    output: Path
    """The folder to write to. A file that exists already is not written again."""
    split: Literal["train", "test"] = "train"
    """train: write training data. test: write test rows as chats, with system prompts and frames that are not in the training
    data, and print no commands."""
    url: HttpUrl | None = None
    """A running server whose base model answers. This is several times as fast as loading the model here."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 means as many as there are CPUs that other processes leave idle."""


def bare(task: str, prompt: str) -> str:
    """Return the bare message of a plain prompt of `task`, as a person would write it: the prompt without its frame."""
    if task == "safety":
        return prompt
    text = prompt.partition(": ")[2]  # after "Customer" or "Question"
    if text.endswith("\nAnswer (true or false):"):
        return text.removesuffix("\nAnswer (true or false):") + " True or false?"
    return text.rpartition("\n")[0]  # before "Intent:" or "Answer:"


def as_part(prompt: str) -> str:
    """Return a request as part of a sentence: with a small first letter, without a punctuation mark at its end."""
    return prompt[:1].lower() + prompt[1:].rstrip(".?!")


class Files:
    """The files of a run. A file that exists is not written again."""

    def __init__(self, config: DemoConfig) -> None:
        self.config = config

    @cached_property
    def base(self) -> BaseModel | None:
        """The embedded model; None if a server answers."""
        return None if self.config.url else load_base(None, "auto", self.config.threads)

    def opening(self) -> str:
        """Return the text that the base's chat template puts before the first user message."""
        message = {"role": "user", "content": MARK}
        if self.base:
            text = str(self.base.tokenizer.apply_chat_template([message], tokenize=False))
        else:
            [text] = Server(str(self.config.url)).ask_all(_render_chat, [message])
        return text.partition(MARK)[0]

    def make(self, name: str, rows: Callable[[], Iterable[Mapping[str, Any]]]) -> Path:
        """Write `rows` to the file `name`, unless it exists, and return its path."""
        file = self.config.output / f"{name}.jsonl"
        if not file.exists():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows()]
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, "".join(lines).encode())
            logger.info("%s: %d rows", file, len(lines))
        return file

    def filtered(self, name: str, file: Path, is_wanted: Callable[[Row], bool]) -> Path:
        """Write the rows of `file` for which `is_wanted` is true to the file `name`, and return its path."""
        return self.make(name, lambda: filter(is_wanted, rows_of(file)))

    def answered(self, name: str, file: Path, **options: Any) -> Path:
        """Write the base model's answers to the prompts of `file` to the file `name`, and return its path.

        `options` are those of `training.answer`.
        """
        defaults = {"data": [str(file)], "output": f"{name}.jsonl", "on_bad": "skip", "url": self.config.url}
        config = AnswerConfig.model_validate(defaults | options)
        return self.make(name, lambda: answer_rows(self.base, select_rows(config), config))

    def as_chats(self, name: str, file: Path, **options: Any) -> Path:
        """Write the rows of `file`, made into chats, to the file `name`, and return its path.

        `options` are those of `training.chats`.
        """
        if self.config.split == "test":
            options["system_prompts"] = HERE / "system_prompts_test.txt"
        config = ChatsConfig.model_validate({"data": [str(file)], "output": f"{name}.jsonl"} | options)
        return self.make(name, lambda: chats(config))

    def task(self, task: str) -> list[Row]:
        """Return the rows of a task's data set, in the split of the run."""
        return rows_of(self.config.data / task / f"{self.config.split}.jsonl")

    def bare(self, task: str) -> Path:
        """Write a task's rows with bare messages as prompts to a file, and return its path."""
        return self.make(f"{task}-bare", lambda: [row | {"prompt": bare(task, row["prompt"])} for row in self.task(task)])

    def parts(self) -> Path:
        """Write the requests of `safety` as parts of sentences to a file, and return its path."""
        return self.make("safety-parts", lambda: [row | {"prompt": as_part(row["prompt"])} for row in self.task("safety")])

    def texts(self, name: str) -> Path:
        """Return the file of texts `name` of this package, of the split of the run."""
        return HERE / f"{name}{'_test' if self.config.split == 'test' else ''}.txt"

    def lines(self, name: str) -> Path:
        """Write the lines of the file of texts `name` of this package as prompts to a file, and return its path."""
        return self.make(name, lambda: prompts_of(HERE / f"{name}.txt"))

    def framed(self, name: str, file: Path, frames: str, **options: Any) -> Path:
        """Write the rows of `file`, put into frames, as chats to the file `name`, and return its path."""
        return self.as_chats(name, file, frames=self.texts(f"{frames}_frames"), **options)

    def acts(self, name: str, answers: Sequence[Row]) -> Path:
        """Write questions about how to do the acts of a file of texts to the file `name`, and return its path.

        They are chats, and get `answers` in turn.
        """
        num_questions = NUM_QUESTIONS[name] if self.config.split == "train" else 1
        rows = [row for row in prompts_of(self.texts(name)) for _ in range(num_questions)]
        acts = self.make(f"{name}-parts", lambda: [answer | row for answer, row in zip(cycle(answers), rows, strict=False)])
        return self.framed(name, acts, "question", **NO_CONTEXT)


async def _render_chat(ask: Ask, message: Mapping[str, str]) -> str:
    tokens = (await ask("/tokenize", {"messages": [message]}))["tokens"]
    return str((await ask("/detokenize", {"tokens": tokens}))["prompt"])


def rows_of(file: Path) -> list[Row]:
    """Return the objects of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def prompts_of(file: Path) -> list[Row]:
    """Return a row for each line of a text file."""
    return [{"prompt": line} for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def expand(line: str) -> list[str]:
    """Return the texts that a line with alternatives, such as `Good {morning|evening}.`, stands for."""
    parts = ALTERNATIVES.split(line)
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(texts) for texts in product(*choices)]


def texts_of(name: str) -> list[str]:
    """Return the texts that the lines of the file of texts `name` of this package stand for, each once."""
    lines = (HERE / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [*dict.fromkeys(text for line in lines for text in expand(line))]


def everyday(files: Files) -> Path:
    """Return a file of everyday messages without answers. It has none of the messages in `ordinary_test.txt`."""

    def messages() -> list[Row]:
        test_messages = {row["prompt"] for row in prompts_of(HERE / "ordinary_test.txt")}
        return [{"prompt": text} for text in texts_of("ordinary") if text.strip() and text not in test_messages]

    return files.make("everyday", messages)


def ordinary(files: Files) -> Path:
    """Return a file of ordinary messages without answers: the base model's own, and harmless ones that sound harmful."""

    empty = files.make("ordinary-openings", lambda: [{"prompt": files.opening()}] * NUM_ORDINARY)
    generated = files.answered("ordinary-asked", empty, template="plain", temperature=1.0, max_tokens=64)

    def messages() -> Iterable[Row]:
        texts = [row["completion"].strip() for row in rows_of(generated) if not row["truncated"]]
        return [*({"prompt": text} for text in dict.fromkeys(texts) if text), *prompts_of(HERE / "lookalikes.txt")]

    return files.make("ordinary", messages)


def prepare(files: Files) -> dict[str, tuple[list[Path], list[Path]]]:
    """Write all files. Return, for each adapter, the files of its training data (--data) and those to mix in (--mix)."""
    ordinary_answers = files.answered("ordinary-answered", ordinary(files), max_tokens=48)
    ordinary_chats = files.as_chats("ordinary-chats", ordinary(files), earlier=[str(ordinary_answers)], **SHORT_CHATS)
    mix = {"ordinary": [files.answered("keep-ordinary", ordinary_chats, max_tokens=32)]}
    data: dict[str, list[Path]] = {}
    for task in TASKS:
        train_file = files.config.data / task / "train.jsonl"
        bare_rows = files.bare(task)
        answered_file = bare_rows
        if task == "safety":
            answered_file = files.filtered("safety-answered", bare_rows, lambda row: bool(row.get("completion")))
        earlier = [str(ordinary_answers), str(answered_file)]
        data[task] = [train_file, files.as_chats(f"{task}-chats", answered_file, earlier=earlier, **SHORT_CHATS)]
        if task in NUM_LATER:
            later = {"earlier": [str(ordinary_answers)], "earlier_fraction": 1.0, "num_rows": NUM_LATER[task]}
            data[task].append(files.as_chats(f"{task}-later", answered_file, **later))
        mix[task] = [
            files.answered(
                f"keep-{task}-plain", train_file, template="plain", num_rows=2 * NUM_MIXED if task == "safety" else NUM_MIXED
            ),
            files.answered(f"keep-{task}-chats", data[task][1], num_rows=NUM_MIXED),
        ]
    safety_data, benign = safety(files, ordinary_answers)
    data["safety"] = [*safety_data, *data["safety"][1:]]
    return {task: (data[task], mix_of(task, mix) + (benign if task == "safety" else [])) for task in TASKS}


def mix_of(task: str, mix: Mapping[str, list[Path]]) -> list[Path]:
    """Return the files to mix in for the adapter of `task`: those of the other tasks, and of ordinary messages."""
    return [file for name, files in mix.items() if name != task for file in files]


def safety(files: Files, ordinary_answers: Path) -> tuple[list[Path], list[Path]]:
    """Return the training data of `safety` besides its chats, and the files of benign requests in the same forms to mix in."""
    rows = files.bare("safety")
    harmful = files.config.output / "safety-answered.jsonl"
    benign = files.filtered("safety-benign", rows, lambda row: not row.get("completion"))
    benign_answers = files.answered("benign-answered", benign, any_template=True, max_tokens=40)
    data, mix = [harmful, benign_answers], []
    messages = everyday(files)
    message_chats = files.as_chats("everyday-chats", messages, earlier=[str(ordinary_answers)], **SHORT_CHATS)
    mix.append(files.answered("keep-everyday", messages, any_template=True, max_tokens=24))
    mix.append(files.answered("keep-everyday-chats", message_chats, max_tokens=24))
    benign_chats = files.as_chats("benign-chats", benign, earlier=[str(ordinary_answers)])
    mix.append(files.answered("keep-benign-chats", benign_chats, max_tokens=48))
    context: dict[str, Any] = {"earlier": [str(ordinary_answers)], "system_fraction": 0.3, "earlier_fraction": 0.3}
    for frames in ("sum", "mixed"):
        framed = files.framed(f"safety-{frames}", files.parts(), frames, **context)
        data.append(files.filtered(f"safety-{frames}-harmful", framed, lambda row: row["harmful"]))
        framed_benign = files.filtered(f"safety-{frames}-benign", framed, lambda row: not row["harmful"])
        mix.append(files.answered(f"keep-{frames}-benign", framed_benign, max_tokens=48))
    return data, mix


def write_test_chats(files: Files) -> None:
    """Write the test rows as chats."""
    ordinary_answers = files.answered(
        "ordinary-answered", files.make("ordinary", lambda: prompts_of(HERE / "ordinary_test.txt")), max_tokens=48
    )
    for task in TASKS:
        rows = files.bare(task)
        files.as_chats(f"{task}-chat", rows, earlier=[str(ordinary_answers)])
        files.as_chats(f"{task}-message", rows, **NO_CONTEXT)
        files.as_chats(f"{task}-system", rows, system_fraction=1.0, earlier_fraction=0.0)
        files.as_chats(f"{task}-later", rows, earlier=[str(ordinary_answers)], system_fraction=0.5, earlier_fraction=1.0)
    for frames in ("sum", "mixed", "question"):
        files.framed(f"safety-{frames}", files.parts(), frames, **NO_CONTEXT)
    acts = [
        files.acts(name, [{"harmful": is_harmful}]) for name, is_harmful in (("harmful_acts", True), ("harmless_acts", False))
    ]
    files.make("safety-acts", lambda: [row for file in acts for row in rows_of(file)])


def statements(files: Files) -> Path:
    """Return a file of statements, such as aphorisms and news: openings that the base model completes."""
    openings = files.make("openings", lambda: [{"prompt": text} for text in texts_of("openings")])
    completed = files.answered("openings-completed", openings, template="plain", max_tokens=32)
    return files.make("statements", lambda: [{"prompt": up_to_sentence(row)} for row in rows_of(completed)])


def up_to_sentence(row: Row) -> str:
    """Return a row's prompt and completion as one text, up to the end of its last whole sentence if there is one."""
    text = " ".join(f"{row['prompt']}{row['completion']}".split())
    end = max(f"{text} ".rfind(mark) for mark in (". ", "! ", "? "))
    return text[: end + 1] or text


def background(files: Files) -> list[str]:
    """Write the prompts that are no adapter's. Return the commands that make the background of the embedded model from them.

    The second one extends what the first one makes, so that statistics made with the first are valid.
    """
    messages = [row for file in (ordinary(files), everyday(files)) for row in rows_of(file)]
    kinds = [
        ordinary(files),
        everyday(files),
        files.filtered("safety-benign", files.bare("safety"), lambda row: not row.get("completion")),
        files.make("code", code_prompts),
        files.make("prose", prose),
        files.make("unpunctuated", lambda: [{"prompt": as_part(row["prompt"])} for row in messages]),
        files.acts("harmless_acts", [{}]),
        files.make("languages", lambda: [{"prompt": text} for text in texts_of("languages")]),
    ]
    added = [statements(files), files.lines("general_questions"), files.lines("personal_messages")]
    original, extended = (files.config.output / name for name in (BACKGROUND, EXTENDED_BACKGROUND))
    return [
        _background_command(kinds, original),
        _background_command(added, extended, "--extend", str(original), "--log-odds", str(LOG_ODDS)),
    ]


def _background_command(kinds: Sequence[Path], output: Path, *options: str) -> str:
    sources = [word for kind in kinds for word in ("--data", str(kind))]
    return shlex.join(["python", "-m", "training.background", *options, *sources, "--output", str(output)])


def safety_statistics(files: Files) -> str:
    """Return the command that replaces the statistics of `safety` by those of more forms of its prompts.

    Its training data, which `training.fit` measures, has no questions, so that "How do I steal a car?" would be nobody's.
    """
    folder = files.config.output
    questions = files.framed("safety-question", files.parts(), "question", **NO_CONTEXT)
    refusals = [{"completion": row["completion"]} for row in rows_of(folder / "safety-answered.jsonl")]
    acts = files.acts("harmful_acts", refusals)
    forms = [
        *(folder / f"safety-{name}.jsonl" for name in ("answered", "sum-harmful", "mixed-harmful")),
        files.filtered("safety-question-harmful", questions, lambda row: row["harmful"]),
        files.filtered("harmful_acts-punctuated", acts, _is_punctuated),
        files.filtered("harmful_acts-unpunctuated", acts, lambda row: not _is_punctuated(row)),
    ]
    words = ["python", "-m", "training.calibrate", str(folder / "adapters" / "safety")]
    return shlex.join([*words, *(word for form in forms for word in ("--data", str(form)))])


def _is_punctuated(row: Row) -> bool:
    text: str = row["prompt"][-1]["content"]
    return text.endswith((".", "?"))


def command(config: DemoConfig, task: str, data: Iterable[Path], mix: Iterable[Path]) -> str:
    """Return the command that trains the adapter of `task`."""
    prepare_command = f"python -m training.demo --data {config.data} --output {config.output}"
    words = ["python", "-m", "training.fit", "--output", str(config.output / "adapters" / task), "--about", ABOUT[task]]
    words += ["--prepare", prepare_command]
    for flag, paths in (("--data", data), ("--mix", mix)):
        words += [word for path in paths for word in (flag, str(path))]
    words += ["--template", "chat", "--template", "plain", "--on-bad", "skip"]
    for option, value in SETTINGS[task].items():
        for item in value if isinstance(value, list) else [value]:
            words += [f"--{option.replace('_', '-')}", str(item)]
    return shlex.join(words)


def main() -> int:
    """Run the program and return its exit code."""
    config = DemoConfig.from_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # httpx logs each request at INFO

    def program() -> str:
        files = Files(config)
        if config.split == "test":
            write_test_chats(files)
            return f"wrote test rows as chats to {config.output}"
        commands = [command(config, task, *paths) for task, paths in prepare(files).items()]
        return "\n".join([*commands, *background(files), safety_statistics(files)])

    return run_program(program)


if __name__ == "__main__":
    sys.exit(main())
