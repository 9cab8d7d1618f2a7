"""A server that imports everything once and forks a `normfree` command per request, so that killing one is cheap.

Requests are JSON lines on standard input, answers JSON lines on standard output:
{"start": [words], "errors": path, "dies": null or [step, place]} -> process id;
{"wait": process id} -> exit status, negative for a signal.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

PLACES = ("half of optimizer.pt", "before the manifest", "before the rename")
"""Where in a save a command can kill itself."""


class ForkServer:
    """The client: `start` a command, kill it as you like, `wait` for its end."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)

    def start(self, words: list[str], errors: Path, *, dies: tuple[int, str] | None = None) -> int:
        """Start a command and return its process id; with `dies` it kills itself at that step and place of a save."""
        process = self._ask({"start": words, "errors": str(errors), "dies": dies})
        assert process > 0
        return process

    def wait(self, process: int) -> int:
        return self._ask({"wait": process})

    def close(self) -> None:
        with self.process, suppress(ProcessLookupError):  # leaving it closes the pipes and waits
            os.killpg(self.process.pid, signal.SIGKILL)

    def _ask(self, request: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except BaseException:  # a test's time limit: a late answer must not reach the next request
            self.close()
            raise


def serve() -> None:
    from normfree.cli.main import main
    from normfree.training.study import run_study

    assert run_study  # imports training, the model and every library
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = os.fork()
            if not answer:
                _become(request, main)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        print(answer, flush=True)


def _become(request: dict[str, Any], main: Any) -> None:
    """Run the command in the child; never returns."""
    status = 99
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # else ignored where the tests run under nohup
        if request["dies"]:
            _die(*request["dies"])
        errors = os.open(request["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(errors, stream)
        status = main(request["start"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _die(step: int, place: str) -> None:
    """Make this process kill itself inside the save of `step`."""
    import torch

    from normfree.store import checkpoints

    assert place in PLACES
    write, save = checkpoints.write_manifest, torch.save

    def save_half(content: object, path: str, *rest: Any, **named: Any) -> None:
        save(content, path, *rest, **named)
        if place == "half of optimizer.pt" and Path(path).match(f"checkpoint-{step}/optimizer.pt"):
            os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
        if facts["step"] == step and place == "before the manifest":
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder, facts)
        if facts["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save, checkpoints.write_manifest = save_half, write_manifest


if __name__ == "__main__":
    serve()
