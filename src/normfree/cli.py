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
from typing import Any

from normfree import __version__, commands, cost_commands, model_commands
from normfree.config import build, describe_keys, nearest

FLAGS = "--help, --version, --debug, of train -m and --cfg job, and of study --cfg job"
HELP, MANY, SHOW = ("-h", "--help"), ("-m", "--multirun"), ("--cfg", "--cfg=job", "job")


@dataclass(frozen=True)
class Verb:
    """One verb: what it takes, an example, and what it calls."""

    run: Callable[..., None]
    objects: str
    """Names of what follows the verb; a trailing "..." takes one or more; empty takes none."""
    summary: str
    example: str
    options: type | None = None
    """Dataclass of its keys; None means the keys of a run."""
    corpus_only: bool = False
    """Of the keys of a run, it takes those that decide a corpus."""


VERBS = {
    "data": Verb(
        commands.data, "SOURCE", "prepare a corpus and describe it", "normfree data installed", corpus_only=True
    ),
    "train": Verb(
        commands.train,
        "",
        "train one run; many with -m; print it and train nothing with --cfg",
        "normfree train preset=cpu-quick variant=sm-r seed=1",
    ),
    "study": Verb(
        commands.study,
        "STUDY",
        "train all runs of a study, then report; print them and train nothing with --cfg",
        "normfree study quick",
    ),
    "evaluate": Verb(
        model_commands.evaluate,
        "MODEL",
        "perplexity and bits per byte of any causal language model",
        "normfree evaluate runs/quick/sm-r-seed0 text=README.md",
        model_commands.EvaluateOptions,
    ),
    "measure": Verb(
        model_commands.measure,
        "MODEL",
        "entropy of every attention head, and more, of any Hugging Face language model",
        "normfree measure runs/quick/sm-g-seed0",
        model_commands.MeasureOptions,
    ),
    "cost": Verb(
        cost_commands.cost,
        "MODEL",
        "communication and rounds of a model in private inference",
        "normfree cost gpt2-t128 variant=sm-r",
        cost_commands.CostOptions,
    ),
    "verify": Verb(
        commands.verify,
        "RUN",
        "check a run folder, its checkpoints, model and corpus",
        "normfree verify runs/quick/sm-r-seed0",
        commands.VerifyOptions,
    ),
    "report": Verb(
        commands.report,
        "RUNS...",
        "tables, figures and one page from run folders",
        "normfree report runs/quick output=report",
        commands.ReportOptions,
    ),
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
        print(f"normfree: {_one_line(error)}", file=sys.stderr)
        return _exit_status(error)
    return 0


def _nobody_reads() -> bool:
    """Whether standard output goes to somebody who has read enough, as `| head`; then what is left goes nowhere."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in output.poll(0))
    if gone:
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
    if name == "train" and any(word in MANY for word in rest):
        flags["many"] = True
        rest = [word for word in rest if word not in MANY]
    if name in ("train", "study") and any(word in SHOW[:2] for word in rest):
        flags["show"] = True
        rest = [word for word in rest if word not in SHOW]
    if unknown := [word for word in rest if word.startswith("-")]:
        raise UsageError(f"unknown flag {unknown[0]!r}; the flags are {FLAGS}; all else is key=value")
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
    if not verb.objects and given:
        raise UsageError(f"normfree {name} takes key=value only, got {given[0]!r}; example: {verb.example}")
    if verb.objects and (not given or (len(given) > 1 and not many)):
        raise UsageError(
            f"normfree {name} needs {verb.objects}, got {' '.join(given) or 'nothing'}; example: {verb.example}"
        )
    return [given] if many else given


def _keys(name: str, verb: Verb, pairs: list[str]) -> Any:
    if verb.options is not None:
        try:
            return build(verb.options, dict(pair.split("=", 1) for pair in pairs))
        except ValueError as error:
            raise UsageError(str(error)) from None
    if wrong := [pair for pair in pairs if verb.corpus_only and not _decides_a_corpus(pair.partition("=")[0])]:
        raise UsageError(f"normfree {name} takes data.* keys, preset= and cache_dir=, got {wrong[0]!r}")
    return pairs


def overview() -> str:
    """All verbs, with one example each."""
    lines = [
        f"normfree {__version__}: train transformers without LayerNorm and measure what their heads do",
        "",
    ]
    width = max(len(verb.example) for verb in VERBS.values())
    lines += [f"  {verb.example:<{width}}  {verb.summary}" for verb in VERBS.values()]
    lines += ["", "normfree VERB --help explains a verb; --debug shows the stack trace of an error."]
    return "\n".join(lines)


def help_for(name: str, verb: Verb) -> str:
    """What a verb takes: its objects, an example and every key with its default."""
    usage = " ".join(filter(None, ["normfree", name, verb.objects, "[key=value ...]"]))
    return "\n".join([usage, f"  {verb.summary}", "", f"example: {verb.example}", "", *_key_help(verb)])


def _key_help(verb: Verb) -> list[str]:
    if verb.options is not None:
        return [_key_line(key, *row) for key, row in describe_keys(verb.options).items()]
    from normfree.compose import GROUPS, describe_run, members

    if verb.corpus_only:
        lines = [_key_line("preset", None, f"whose corpus: {', '.join(members('preset'))}")]
        lines += [_key_line("cache_dir", None, "where corpora are kept")]
        lines += [_key_line(*row) for row in describe_run() if _decides_a_corpus(row[0])]
        return [*lines, "", "Values shown are those of preset=cpu with the source `installed`."]
    lines = [f"  {group + '=':<12}{', '.join(members(group))}" for group in GROUPS]
    lines.append(f"  {'studies':<12}{', '.join(members('studies'))}")
    lines += ["", "  workers=1       study only: processes that share its runs and this machine's cores"]
    lines += ["  runs_dir=runs   where runs are kept", "  cache_dir=      where corpora are kept", ""]
    lines += [_key_line(*row) for row in describe_run()]
    return [
        *lines,
        "",
        "Values shown are those of data=installed preset=cpu variant=sm-ln-g, which a command has unless it says "
        "otherwise;",
        "`normfree train KEY=VALUE ... --cfg job` prints those of any other. An empty model.vocab_size,",
        "max_position_embeddings, bos_token_id or eos_token_id is that of the corpus.",
    ]


def _decides_a_corpus(key: str) -> bool:
    return key.startswith("data.") or key in ("preset", "cache_dir")


def _key_line(key: str, default: object, meaning: str) -> str:
    if isinstance(default, list):
        default = f"[{','.join(map(str, default))}]"
    shown = "" if default in (None, "None") else default
    return f"  {f'{key}={shown}':<38} {' '.join(meaning.split())}".rstrip()


def _exit_status(error: Exception) -> int:
    signal_number = getattr(error, "signal_number", None)
    if signal_number is not None:
        return 128 + signal_number
    return 2 if isinstance(error, UsageError) else 1


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    expected = (ValueError, OSError, RuntimeError)
    known = isinstance(error, expected) or hasattr(error, "signal_number")
    return text if known else f"{type(error).__name__}: {text} (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
