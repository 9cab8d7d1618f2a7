"""A process that imports everything once and forks a `normfree` command for each order: killing one costs a second.

Orders are JSON lines on standard input, answers JSON lines on standard output:
{"start": [words], "errors": path, "dies": null or [step, place]} -> process id;
{"wait": process id} -> exit status, negative for a signal.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

PLACES = ("half of optimizer.pt", "before the manifest", "before the rename")
"""Where in a save a command can be told to kill itself."""


class ForkServer:
    """The tests' side: `start` a command, kill it as you like, `wait` for its end.

    A question that is cut short, as by the time limit of a test, ends the server with all its commands: its answer
    would be taken for that of the next question. The next start has a new one.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def start(self, words: list[str], errors: Path, *, dies: tuple[int, str] | None = None) -> int:
        """Process id of the command; with `dies`, (step, place), it kills itself at that one of PLACES in that save."""
        if self.process is None:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
                start_new_session=True,
            )
        process = self._ask({"start": words, "errors": str(errors), "dies": dies})
        assert process > 0
        return process

    def wait(self, process: int) -> int:
        return self._ask({"wait": process})

    def close(self) -> None:
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                self.process.communicate(timeout=10)
            self._kill()

    def _ask(self, order: dict[str, Any]) -> int:
        assert self.process is not None, "the server has ended, and its commands with it"
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except BaseException:
            self._kill()
            raise

    def _kill(self) -> None:
        process, self.process = self.process, None
        assert process is not None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):  # half an order
                stream.close()


def serve() -> None:
    from normfree.cli.main import main
    from normfree.training.study import run_study

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
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # else ignored where the tests run under nohup
        if order["dies"]:
            _die(*order["dies"])
        errors = os.open(order["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(errors, stream)
        status = main(order["start"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _die(step: int, place: str) -> None:
    """Let this process kill itself inside the save of `step`."""
    import torch

    from normfree.training import checkpoints
    from normfree.training.trainer import NormFreeTrainer

    assert place in PLACES
    save, write, save_whole = NormFreeTrainer._save_optimizer_and_scheduler, checkpoints.write_manifest, torch.save

    def save_half(trainer: NormFreeTrainer, folder: str | None) -> None:
        if trainer.state.global_step == step:
            torch.save = half
        save(trainer, folder)

    def half(content: object, path: str, *_: object, **__: object) -> None:
        with io.BytesIO() as whole, Path(path).open("wb") as file:
            save_whole(content, whole)
            file.write(whole.getvalue()[: whole.tell() // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
        if facts["step"] == step and place == "before the manifest":
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder, facts)
        if facts["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    if place == "half of optimizer.pt":
        NormFreeTrainer._save_optimizer_and_scheduler = save_half
    else:
        checkpoints.write_manifest = write_manifest


if __name__ == "__main__":
    serve()
