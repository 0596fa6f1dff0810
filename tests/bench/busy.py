"""Training while another process keeps one CPU busy: tokens/s for several numbers of threads, and without `--threads`.

    python -m tests.bench.busy [--rounds 3] [--steps 12]

Each round trains with 1 thread, with one thread for each CPU, and with the number that `training.fit` chooses; first with one
busy CPU, then on an idle machine. Prints the median and range of each, and the chosen number's speed relative to the best one's.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

SPEED = re.compile(r"tokens_per_s=(\d+)")
CHOSEN = 0


@contextmanager
def busy_cpu() -> Iterator[None]:
    """Context manager: keep the first CPU busy."""
    cpu = min(os.sched_getaffinity(0))
    burn = f"import os; os.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", burn]) as process:
        try:
            yield
        finally:
            process.kill()


def speed(data: Path, output: Path, num_threads: int, num_steps: int) -> int:
    """Return the tokens/s of a training with `num_threads`; 0 lets `training.fit` choose the number."""
    flags = [
        "--data",
        str(data),
        "--output",
        str(output),
        "--method",
        "lori-d",
        "--steps",
        str(num_steps),
        "--batch-tokens",
        "512",
    ]
    flags += ["--threads", str(num_threads)] if num_threads else []
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "training.fit", *flags], env=environment, capture_output=True, text=True, check=True
    )
    return int(SPEED.findall(done.stderr)[-1])


def main() -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    numbers = sorted({1, len(os.sched_getaffinity(0)), CHOSEN})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "rows.jsonl"
        rows = [{"prompt": f"How much is {i} and {i + 1}?", "completion": f" It is {2 * i + 1}."} for i in range(400)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for is_busy in (True, False):
            speeds: dict[int, list[int]] = defaultdict(list)
            for _ in range(arguments.rounds):
                for number in numbers:
                    with busy_cpu() if is_busy else nullcontext():
                        speeds[number].append(speed(data, folder / "adapter", number, arguments.steps))
            medians = {number: statistics.median(values) for number, values in speeds.items()}
            for number, values in speeds.items():
                threads = "chosen" if number == CHOSEN else str(number)
                line = {"busy": is_busy, "threads": threads, "tokens_per_s": medians[number], "range": [min(values), max(values)]}
                print(json.dumps(line), flush=True)
            best = max(value for number, value in medians.items() if number != CHOSEN)
            print(json.dumps({"busy": is_busy, "of_best": round(medians[CHOSEN] / best, 3)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
