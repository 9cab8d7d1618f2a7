"""The command line: `normfree VERB OBJECT... key=value`. Flags: --help, --version, --debug, train's -m, and --cfg."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from typing import Any, get_type_hints

from normfree import __version__
from normfree.cli import cost as cost_commands
from normfree.cli import models as model_commands
from normfree.cli import runs as commands
from normfree.spec.keys import build, describe_keys, nearest

HELP, MANY, SHOW = ("-h", "--help"), ("-m", "--multirun"), ("--cfg", "--cfg=job", "job")


@dataclass(frozen=True)
class Verb:
    """One verb: the command it calls, what it takes and an example."""

    run: Callable[..., None]
    objects: str
    """Names of what follows the verb; a trailing "..." takes one or more; empty takes none."""
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
    "data": Verb(commands.data, "SOURCE", "normfree data installed"),
    "train": Verb(commands.train, "", "normfree train preset=cpu-quick variant=sm-r seed=1"),
    "study": Verb(commands.study, "STUDY", "normfree study quick"),
    "evaluate": Verb(model_commands.evaluate, "MODEL", "normfree evaluate runs/quick/sm-r-seed0 text=README.md"),
    "measure": Verb(model_commands.measure, "MODEL", "normfree measure runs/quick/sm-g-seed0"),
    "cost": Verb(cost_commands.cost, "MODEL", "normfree cost gpt2-t128 variant=sm-r"),
    "verify": Verb(commands.verify, "RUN", "normfree verify runs/quick/sm-r-seed0"),
    "report": Verb(commands.report, "RUNS...", "normfree report runs/quick output=report"),
}


class UsageError(ValueError):
    """A command line that cannot be understood."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. Errors are one line, with a stack trace only under --debug."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("normfree").setLevel(logging.INFO)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: a ± or a name never ends a command
    os.environ.pop("MPLBACKEND", None)  # a notebook's: matplotlib refuses one that is not here, and ours needs none
    try:
        dispatch(words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("normfree: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + signal.SIGPIPE
        if debug:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        signal_number = getattr(error, "signal_number", None)
        if signal_number is None and not isinstance(error, (ValueError, OSError, RuntimeError)):
            text = f"{type(error).__name__}: {text} (--debug shows where)"
        print(f"normfree: {text}", file=sys.stderr)
        return 128 + signal_number if signal_number else 2 if isinstance(error, UsageError) else 1
    return 0


def _nobody_reads() -> bool:
    """Whether standard output goes to somebody who has read enough, as `| head`; then what is left goes nowhere."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if gone := bool(output.poll(0)):  # asked for no event, it tells errors only
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def dispatch(words: Sequence[str]) -> None:
    """Find the verb and call it with its objects and keys. Raises UsageError for words it cannot place."""
    if "--version" in words:
        print(__version__)
        return
    if words and words[0] in (*HELP, "help"):
        words = [*words[1:2], "--help"]
    if not words or words[0] == "--help":
        print(overview())
        return
    name, *rest = words
    if name not in VERBS:
        raise UsageError(f"unknown verb {name!r}; {nearest(name, list(VERBS))}")
    verb = VERBS[name]
    if any(word in HELP for word in rest):
        print(help_for(name, verb))
        return
    flags = {}
    for flag, spellings in {"many": MANY, "show": SHOW}.items():
        if flag in get_type_hints(verb.run) and any(word in spellings[:2] for word in rest):
            flags[flag] = True
            rest = [word for word in rest if word not in spellings]
    if unknown := [word for word in rest if word.startswith("-")]:
        known = "--help, --version, --debug, of train -m and --cfg job, and of study --cfg job"
        raise UsageError(f"unknown flag {unknown[0]!r}; the flags are {known}; all else is key=value")
    if (name == "study" or "many" in flags) and "show" not in flags and "TORCHELASTIC_RUN_ID" in os.environ:
        raise UsageError("torchrun starts one run; a study or a sweep is started without it")
    pairs = [word for word in rest if _is_pair(word)]
    objects = _objects(name, verb, [word for word in rest if not _is_pair(word)])
    verb.run(*objects, _keys(name, verb, pairs), **flags)


def _is_pair(word: str) -> bool:
    """Whether a word is key=value; a path may hold an equals sign too, and only Hydra's own keys a slash."""
    key, equals, _ = word.partition("=")
    return bool(equals) and ("/" not in key or key.startswith("hydra/"))


def _objects(name: str, verb: Verb, given: list[str]) -> list[Any]:
    many = verb.objects.endswith("...")
    if bool(given) != bool(verb.objects) or (len(given) > 1 and not many):
        takes, got = verb.objects or "key=value only", " ".join(given) or "nothing"
        raise UsageError(f"normfree {name} takes {takes}, got {got}; example: {verb.example}")
    return [given] if many else given


def _keys(name: str, verb: Verb, pairs: list[str]) -> Any:
    if verb.options is not None:
        try:
            return build(verb.options, dict(pair.split("=", 1) for pair in pairs))
        except ValueError as error:
            raise UsageError(str(error)) from None
    if name == "data" and (wrong := [pair for pair in pairs if not _decides_a_corpus(pair.partition("=")[0])]):
        raise UsageError(f"normfree data takes data.* keys, preset= and cache_dir=, got {wrong[0]!r}")
    return pairs


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
    return "\n".join([usage, f"  {verb.summary}", "", f"example: {verb.example}", "", *_key_help(name, verb)])


def _key_help(name: str, verb: Verb) -> list[str]:
    if verb.options is not None:
        return [_key_line(key, *row) for key, row in describe_keys(verb.options).items()]
    from normfree.spec.compose import GROUPS, describe_run, members

    rows = describe_run()
    if name == "data":
        lines = [_key_line("preset", None, f"whose corpus: {', '.join(members('preset'))}")]
        lines += [_key_line("cache_dir", None, "where corpora are kept")]
        lines += [_key_line(*row) for row in rows if _decides_a_corpus(row[0])]
        return [*lines, "", "Values shown are those of preset=cpu with the source `installed`."]
    return [
        *(f"  {group + '=':<12}{', '.join(members(group))}" for group in GROUPS),
        f"  {'studies':<12}{', '.join(members('studies'))}",
        "",
        "  workers=1       study only: processes that share its runs and this machine's cores",
        "  runs_dir=runs   where runs are kept",
        "  cache_dir=      where corpora are kept",
        "",
        *(_key_line(*row) for row in rows),
        "",
        "Values shown are those of a command without keys; `normfree train KEY=VALUE ... --cfg job` prints any other.",
        "An empty model.vocab_size, max_position_embeddings, bos_token_id or eos_token_id is that of the corpus.",
    ]


def _decides_a_corpus(key: str) -> bool:
    return key.startswith("data.") or key in ("preset", "cache_dir")


def _key_line(key: str, default: object, meaning: str) -> str:
    if isinstance(default, list):
        default = f"[{','.join(map(str, default))}]"
    shown = "" if default in (None, "None") else default
    return f"  {f'{key}={shown}':<38} {' '.join(meaning.split())}".rstrip()
