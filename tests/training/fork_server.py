"""A process that imports everything once and forks a `normfree` command for each order: killing one costs a second.

Orders are JSON lines on standard input, answers JSON lines on standard output:
{"start": [words], "errors": path} -> process id; {"wait": process id} -> exit status, negative for a signal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class ForkServer:
    """The tests' side: `start` a command, kill it as you like, `wait` for its end."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def start(self, words: list[str], errors: Path) -> int:
        return self._ask({"start": words, "errors": str(errors)})

    def wait(self, process: int) -> int:
        return self._ask({"wait": process})

    def close(self) -> None:
        self.process.communicate()

    def _ask(self, order: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def serve() -> None:
    from normfree.cli import main
    from normfree.studies import run_study

    assert run_study  # with it come training, the model and every library underneath
    for line in sys.stdin:
        order = json.loads(line)
        if "start" in order:
            answer = os.fork()
            if not answer:
                _become(order, main)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        print(answer, flush=True)


def _become(order: dict[str, Any], main: Any) -> None:
    """The child: never returns."""
    status = 99
    try:
        errors = os.open(order["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(errors, stream)
        status = main(order["start"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    serve()
