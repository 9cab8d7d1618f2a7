"""The command line: `normfree VERB OBJECT... key=value`. Flags: --help, --version, --debug, -m, --cfg."""

import gc
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, get_type_hints

from normfree import __version__
from normfree.cli import runs
from normfree.cli.cost import cost, estimate
from normfree.cli.evaluate import evaluate
from normfree.cli.measure import measure
from normfree.spec.keys import build, describe_keys, nearest

HELP = ("-h", "--help")
FLAGS = {"-m": "many", "--cfg": "show", "--cfg=job": "show"}  # keyword arguments; `--cfg job` is read too


@dataclass(frozen=True)
class Verb:
    """One verb: the command it calls, what it takes and an example."""

    run: Callable[..., None]
    objects: str  # names of what follows the verb; a trailing "..." takes one or more; empty takes none
    example: str

    @property
    def summary(self) -> str:
        """The first line of the command's docstring."""
        return (self.run.__doc__ or "").partition("\n")[0]

    @property
    def options(self) -> type | None:
        """Dataclass of its keys; None means the keys of a run."""
        return get_type_hints(self.run).get("options")


VERBS = {
    "data": Verb(runs.data, "SOURCE", "normfree data installed"),
    "train": Verb(runs.train, "", "normfree train preset=cpu-quick variant=sm-r seed=1"),
    "estimate": Verb(estimate, "", "normfree estimate preset=gpt2-1.3b gpus=8 gpu=h100 train.sharding=fsdp"),
    "study": Verb(runs.study, "STUDY", "normfree study quick"),
    "evaluate": Verb(evaluate, "MODEL", "normfree evaluate runs/quick/sm-r-seed0 text=README.md"),
    "measure": Verb(measure, "MODEL", "normfree measure runs/quick/sm-g-seed0"),
    "cost": Verb(cost, "MODEL", "normfree cost gpt2-t128 variant=sm-r"),
    "status": Verb(runs.status, "RUNS...", "normfree status runs/quick"),
    "verify": Verb(runs.verify, "RUN", "normfree verify runs/quick/sm-r-seed0"),
    "report": Verb(runs.report, "RUNS...", "normfree report runs/quick output=report"),
}


class UsageError(ValueError):
    """A command line that cannot be understood."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. An error is one line; --debug shows its stack trace."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    # torchrun's other processes would print each line again
    logging.getLogger("normfree").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without ± gets \xb1 instead of a stack trace
    os.environ.pop("MPLBACKEND", None)  # set by notebooks; matplotlib fails where that backend is missing
    try:
        dispatch(words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("normfree: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_closed_pipe():
            return 128 + signal.SIGPIPE
        if debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        signal_number = getattr(error, "signal_number", None)
        if signal_number is None and not isinstance(error, (ValueError, OSError, RuntimeError)):
            text = f"{type(error).__name__}: {text} (--debug shows where)"
        print(f"normfree: {text}", file=sys.stderr)
        return 128 + signal_number if signal_number else 2 if isinstance(error, UsageError) else 1
    finally:
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_available() and distributed.is_initialized():
            # Gloo's threads may abort an interpreter that ends before them. They live as long as the wrapped model,
            # which is part of a reference cycle.
            distributed.destroy_process_group()
            gc.collect()
    return 0


def _reader_closed_pipe() -> bool:
    """True if the reader closed the pipe, as `| head` does; what is left to print is then dropped."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if closed := bool(output.poll(0)):  # registered for no event, so it reports errors only
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def dispatch(words: Sequence[str]) -> None:
    """Call the verb with its objects and keys. Raises UsageError for words that do not fit."""
    if "--version" in words:
        print(__version__)
        return
    if words and words[0] in (*HELP, "help"):
        words = [*words[1:2], "--help"]
    if not words or words[0] == "--help":
        print(overview())
        return
    name, *arguments = words
    if name not in VERBS:
        raise UsageError(f"unknown verb {name!r}; {nearest(name, list(VERBS))}")
    verb = VERBS[name]
    if any(word in HELP for word in arguments):
        print(help_for(name, verb))
        return
    accepted = get_type_hints(verb.run)
    flags = {FLAGS[word]: True for word in arguments if FLAGS.get(word) in accepted}
    arguments = [word for word in arguments if FLAGS.get(word) not in flags]
    if "show" in flags and "job" in arguments:
        arguments.remove("job")
    if unknown := [word for word in arguments if word.startswith("-")]:
        known = "--help, --version, --debug, -m (train), --cfg job (train, study)"
        raise UsageError(f"unknown flag {unknown[0]!r}; the flags are {known}; all else is key=value")
    if (name == "study" or "many" in flags) and "show" not in flags and "TORCHELASTIC_RUN_ID" in os.environ:
        raise UsageError("torchrun starts one run; start a study or `train -m` without it")
    pairs = [word for word in arguments if _is_pair(word)]
    objects, many = [word for word in arguments if not _is_pair(word)], verb.objects.endswith("...")
    if bool(objects) != bool(verb.objects) or (len(objects) > 1 and not many):
        takes, got = verb.objects or "key=value only", " ".join(objects) or "nothing"
        raise UsageError(f"normfree {name} takes {takes}, got {got}; example: {verb.example}")
    options: Any = pairs
    if verb.options is not None:
        try:
            options = build(verb.options, dict(pair.split("=", 1) for pair in pairs))
        except ValueError as error:
            raise UsageError(str(error)) from None
    verb.run(*([objects] if many else objects), options, **flags)


def _is_pair(word: str) -> bool:
    """True for key=value. A path may contain an equals sign too, but no key contains a slash."""
    key, equals, _ = word.partition("=")
    return bool(equals) and "/" not in key


def overview() -> str:
    """All verbs, with one example each."""
    title = f"normfree {__version__}: train transformers without LayerNorm and measure what their heads do"
    width = max(len(verb.example) for verb in VERBS.values())
    lines = [f"  {verb.example:<{width}}  {verb.summary}" for verb in VERBS.values()]
    hint = "normfree VERB --help explains a verb; --debug shows the stack trace of an error."
    return "\n".join([title, "", *lines, "", hint])


def help_for(name: str, verb: Verb) -> str:
    """Help for one verb: its objects, an example and every key with its default."""
    usage = " ".join(filter(None, ["normfree", name, verb.objects, "[key=value ...]"]))
    return "\n".join([usage, f"  {verb.summary}", "", f"example: {verb.example}", "", *_key_help(verb)])


def _key_help(verb: Verb) -> list[str]:
    if verb.options is not None:
        return [_key_line(key, *row) for key, row in describe_keys(verb.options).items()]
    from normfree.spec.compose import GROUPS, describe_run, members, variants
    from normfree.spec.variants import part_names

    text = Path(__file__).with_name("run_keys.txt").read_text(encoding="utf-8")
    groups = {group: members(group) for group in GROUPS} | {"variant": variants()}
    rows = [(f"{group}=", names) for group, names in groups.items()] + [("studies", members("studies"))]
    return [
        text.format(
            groups="\n".join(f"  {name:<12}{', '.join(names)}" for name, names in rows),
            parts="\n".join(f"  {kind:<12}{', '.join(names)}" for kind, names in part_names().items()),
            keys="\n".join(_key_line(*row) for row in describe_run()),
        ).rstrip()
    ]


def _key_line(key: str, default: object, meaning: str) -> str:
    if isinstance(default, list):
        default = f"[{','.join(map(str, default))}]"
    shown = "" if default in (None, "None") else default
    return f"  {f'{key}={shown}':<38} {' '.join(meaning.split())}".rstrip()
