"""Load MODEL of the command line (a run, a folder, a .gguf file or a name on the hub), and the text of a run."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import model_info, try_to_load_from_cache
from huggingface_hub.errors import HTTPError, StrictDataclassError  # pyright: ignore[reportPrivateImportUsage]
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_peft_available
from transformers.utils.peft_utils import find_adapter_config_file

import normfree.model  # registers our architecture with the Auto classes
from normfree.pretrained.gguf import correct_or_refuse
from normfree.pretrained.inputs import kinds_read
from normfree.spec.keys import nearest
from normfree.spec.run import RunSpec
from normfree.store.runs import RUN_FILE, Run, RunFolder, read_run

if TYPE_CHECKING:
    from normfree.data import Corpus

# What transformers raises for names, configs and weights that make no model.
_UNREADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, StrictDataclassError)
_UNUSED = re.compile(
    r"inv_freq$|position_ids$|(attn|attention)\.(masked_)?bias$|causal_mask$"  # buffers that older versions saved
    r"|(^|\.)(pooler|seq_relationship|mtp|vision|visual|audio|multi_modal|multimodal|embed_vision|embed_audio)"
)
"""Weights that no prediction of a next token uses: masks, BERT's other heads, multi-token prediction, images, audio."""
_NO_HEAD = "has no causal language-model head, so it predicts no next token; `normfree measure` measures its heads"
_OTHER_HEAD = re.compile("For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)$")
_LOADING_LOG = logging.getLogger("transformers.modeling_utils")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NoCausalHead(ValueError):  # noqa: N818 - the message is the point
    """The model is no causal language model."""


def load_pretrained(
    name: RunFolder,
    *,
    dtype: str = "fp32",
    device: str | None = None,
    trust_remote_code: bool = False,
    attention: str | None = None,
) -> tuple[Any, Any]:
    """Load (model, tokenizer), the model in evaluation mode on `device` (default: the GPU if there is one).

    `name` is a run, its folder, a folder of save_pretrained, a .gguf file or a name on the Hugging Face hub, and
    `attention` transformers' attn_implementation. Raises ValueError, in one line, if there is no such model, it is no
    causal LM, its tokenizer or a weight is missing (transformers would fill it with random numbers), or transformers
    leaves out a part of it: weights without a place, an adapter without peft, keys of a .gguf file.
    """
    usable_device(device)  # before anything is looked up
    name = os.fspath(name)
    source: dict[str, Any] = _source(name) | {"trust_remote_code": trust_remote_code}
    if find_adapter_config_file(source["pretrained_model_name_or_path"]) and not is_peft_available():
        raise ValueError(f"{name} has an adapter_config.json, which needs pip install 'peft>=0.17'")
    model = _load(name, AutoModelForCausalLM, source, dtype, device, attention)
    tokenizer = _load_tokenizer(name, source)
    if file := source.get("gguf_file"):
        correct_or_refuse(Path(source["pretrained_model_name_or_path"]) / file, model, tokenizer)
    return model, tokenizer


def load_measurable(name: RunFolder, **options: Any) -> tuple[Any, Any, Any]:
    """Load (model, tokenizer, image processor) of any model; None for what the model has no use for.

    A causal LM as `load_pretrained` loads it, whose `options` these are; others as the class that saved them, or as
    AutoModel. Raises ValueError as `load_pretrained` does, and for a model without a processor of its images.
    """
    name = os.fspath(name)
    source = _source(name) | {"trust_remote_code": options.get("trust_remote_code", False)}
    try:
        config = AutoConfig.from_pretrained(**source)
    except _UNREADABLE:  # of an adapter, or unreadable: load_pretrained says why
        config = None
    if not getattr(config, "is_encoder_decoder", False):
        try:
            return *load_pretrained(name, **options), None
        except NoCausalHead:
            pass
    saved_by = next(iter(getattr(config, "architectures", None) or ()), "")
    loader = getattr(normfree.model, saved_by, None) or getattr(transformers, saved_by, AutoModel)
    chosen = (options.get("dtype", "fp32"), options.get("device"), options.get("attention"))
    model = _load(name, loader, source, *chosen)
    kinds = kinds_read(model)
    tokenizer = _load_tokenizer(name, source) if {"text", "target"} & kinds else None
    processor = None
    if "images" in kinds:
        try:
            processor = AutoImageProcessor.from_pretrained(**source)
        except _UNREADABLE as error:  # without pillow, too
            advice = "save the model's preprocessor_config.json beside it"
            raise ValueError(f"{name} has no image processor ({_first_line(error)}); {advice}") from error
    return model, tokenizer, processor


def _load(name: str, loader: Any, source: dict[str, Any], dtype: str, device: str | None, attention: str | None) -> Any:
    """The whole model, by this class of transformers. Raises ValueError as `load_pretrained` says."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; allowed: {', '.join(DTYPES)}")
    target = usable_device(device)
    loading = {"dtype": DTYPES[dtype], "attn_implementation": attention, "output_loading_info": True}
    _LOADING_LOG.addFilter(_is_no_load_report)
    try:
        loaded: Any = loader.from_pretrained(**source, **loading)
        model, info = loaded[0].to(target).eval(), loaded[1]
    except _UNREADABLE as error:
        if "Unrecognized configuration class" in str(error):
            raise NoCausalHead(f"{name} {_NO_HEAD}") from error
        raise _cannot_load(name, error) from error
    finally:
        _LOADING_LOG.removeFilter(_is_no_load_report)
    if missing := sorted(info["missing_keys"]):
        if loader is AutoModelForCausalLM and not any(key.startswith(f"{model.base_model_prefix}.") for key in missing):
            raise NoCausalHead(f"{name} {_NO_HEAD}")
        raise ValueError(f"{name} lacks {len(missing)} weights of its model, e.g. {missing[0]}")
    if extra := sorted(key for key in info["unexpected_keys"] if not _UNUSED.search(key)):
        if loader is AutoModelForCausalLM and _OTHER_HEAD.search("".join(model.config.architectures or [])):
            raise NoCausalHead(f"{name} {_NO_HEAD}")
        raise ValueError(f"{name} holds {len(extra)} weight(s) without a place in its model, e.g. {extra[0]}")
    return model


def _load_tokenizer(name: str, source: dict[str, Any]) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except _UNREADABLE as error:
        raise _cannot_load(name, error) from error
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:  # what transformers makes of no files at all
        raise ValueError(f"{name} has no tokenizer that makes tokens of text; save the model's beside it")
    return tokenizer


def held_out_blocks(run: RunFolder, *, cache: Path | None = None) -> Tensor:
    """(N, T) token ids of a run's held-out text, or (N, B) bytes of its images and classes; `cache` has the corpora."""
    return torch.from_numpy(corpus_of_run(read_run(run), cache).held_out_ids())


def corpus_of_run(run: Run, cache: Path | None) -> Corpus:
    """The corpus behind a run's numbers. Raises ValueError where this machine has none, or gives another."""
    from normfree.data import prepare, prepared

    if corpus := prepared(run.facts["corpus"], cache=cache):
        return corpus
    advice = "give text=FILE" if run.family.causal else "give the cache_dir= that it was trained with"
    try:
        corpus = prepare(RunSpec.from_dict(run.spec).data, cache=cache)
    except ValueError as error:
        raise ValueError(f"the text of {run.folder} is not here ({error}); {advice}") from error
    if corpus.fingerprint != run.corpus:
        raise ValueError(
            f"{run.folder} has corpus {run.corpus[:12]}, and its data settings give {corpus.fingerprint[:12]} here "
            f"(another Python, other packages or files): {advice}"
        )
    return corpus


def usable_device(device: str | None) -> torch.device:
    """The device of this name (None: the GPU if there is one). Raises ValueError if torch cannot use it."""
    try:
        return torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a build of torch without it
        raise ValueError(f"device={device} cannot be used here ({_first_line(error)}); use cpu") from None


def load_config(name: str) -> Any:
    """The config of a folder or hub name. Raises ValueError, in one line, if it cannot be read or reached."""
    source = _source(name)
    try:
        return AutoConfig.from_pretrained(**source)
    except _UNREADABLE as error:
        raise _cannot_load(name, error) from error


def _is_no_load_report(record: logging.LogRecord) -> bool:
    """False for transformers' table of weights, unless an error refers to it: `load_pretrained` says it in one line."""
    text = record.getMessage()
    return "LOAD REPORT" not in text or "MISMATCH" in text or "CONVERSION" in text


def _cannot_load(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"cannot load {name!r} ({_first_line(error)}); give a run, a folder of save_pretrained, a .gguf file, or a hub "
        "name (needs the network, or HF_HOME with a copy)"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _source(name: str) -> dict[str, str]:
    """Where transformers finds the model. Raises ValueError if there is none, here or on the hub."""
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{name} does not exist; give the path of a .gguf file")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if (path / RUN_FILE).is_file():
        run = read_run(path)
        if not (path / "model").is_dir():
            raise ValueError(f"{name} is {run.status} and has no folder model/, which only finished runs save")
        return {"pretrained_model_name_or_path": str(path / "model")}
    if not path.exists():
        beside = sorted(file.parent.name for file in path.parent.glob(f"*/{RUN_FILE}"))
        # Names on the hub have one slash at most, and no runs lie beside them.
        if name.startswith((".", "/")) or name.count("/") > 1 or ("/" in name and beside):
            raise ValueError(f"{name} does not exist{'; ' + nearest(path.name, beside) if beside else ''}")
        try:  # fail at the first request: loading retries
            cached = (try_to_load_from_cache(name, file) for file in ("config.json", "adapter_config.json"))
            if not any(isinstance(path, str) for path in cached):
                model_info(name, timeout=10)
        except (OSError, ValueError, HTTPError) as error:
            raise _cannot_load(name, error) from error
    return {"pretrained_model_name_or_path": name}
