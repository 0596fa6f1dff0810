"""Files and functions of this project that one warm greedy merge over HTTP runs through.

    python -m tests.bench.request_path

Serves the embedded model with the demo adapters in this process. After a first request, which warms caches, it notes each of our
Python functions that runs, in any thread, until the second request's answer has come. Prints the files in the order in which the
request reaches them, with the number of lines of the functions that ran, without their docstrings, comments and blank lines.
"""

import ast
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType

from server.loading import load_service
from server.settings import Settings
from tests.server.live import serve_here

ROOT = Path(__file__).parents[2]
BODY = {"prompt": "Question: What is 2 + 3?\nAnswer:", "adapter": ["math", "safety"], "weights": [1, 0.8], "max_tokens": 16}


def lines_of(code: CodeType) -> int:
    """Return the number of lines with code in a function."""
    source = Path(code.co_filename).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == code.co_name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first == code.co_firstlineno:
                documented = node.body[0] if ast.get_docstring(node) is not None else None
                text = source.splitlines()[first - 1 : node.end_lineno]
                left_out = range(documented.lineno - first, (documented.end_lineno or 0) - first + 1) if documented else ()
                return sum(
                    bool(line.strip()) and not line.strip().startswith("#") for i, line in enumerate(text) if i not in left_out
                )
    return 0  # a lambda or a comprehension: its lines are its function's


def main() -> None:
    """Serve the model, send two requests, and print the path of the second one."""
    seen: dict[CodeType, None] = {}

    def note(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(f"{ROOT}/") and "/tests/" not in frame.f_code.co_filename:
            seen.setdefault(frame.f_code)

    threading.setprofile(note)
    sys.setprofile(note)
    with serve_here(load_service(Settings(threads=1, port=0))) as client:
        client.post("/generate", json=BODY).raise_for_status()
        seen.clear()
        client.post("/generate", json=BODY).raise_for_status()
        called = list(seen)
    sys.setprofile(None)
    threading.setprofile(None)
    files: dict[str, int] = {}
    for code in called:
        name = str(Path(code.co_filename).relative_to(ROOT))
        files[name] = files.get(name, 0) + lines_of(code)
    for name, count in files.items():
        print(f"{count:5} {name}")
    print(f"{len(files)} files, {sum(files.values())} lines of {len(called)} functions")


if __name__ == "__main__":
    main()
