"""The model that a run begins with: random weights, or those of its start."""

import logging
import re
from fnmatch import fnmatch

import torch
import transformers
from torch import Tensor

from normfree.data import Corpus
from normfree.data.tokenizer import load_tokenizer, tokenizer_hash
from normfree.model import HEADS, NormFreeConfig
from normfree.model.classification import Classifier
from normfree.model.conversion import convert
from normfree.model.modeling import NormFreePreTrainedModel
from normfree.spec.families import CLASSIFICATIONS
from normfree.spec.run import RunSpec
from normfree.spec.start import read_start
from normfree.tasks.labels import CLASSES

logger = logging.getLogger("normfree")


def initial_model(spec: RunSpec, config: NormFreeConfig, corpus: Corpus) -> NormFreePreTrainedModel:
    """Build the run's model, with the weights of its start and with frozen parameters.

    Raises ValueError for weights that changed since the spec was composed, another tokenizer than the start's, more
    positions than it has, and patterns of `train.frozen` that name no parameter.
    """
    task = spec.train.objective
    if classifies := task in CLASSIFICATIONS:
        config.id2label = dict(enumerate(CLASSES[task]))
        config.label2id = {name: number for number, name in config.id2label.items()}
    model: NormFreePreTrainedModel = (Classifier if classifies else HEADS[config.family])(config)
    if spec.start != "random":
        _load_start(model, spec, corpus)
    names = [name for name, _ in model.named_parameters()]
    for pattern in spec.train.frozen:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"train.frozen: {pattern!r} names no parameter; there are {', '.join(names[:4])}, ...")
    for name, parameter in model.named_parameters():
        unused = classifies and name.startswith("lm_head.")
        parameter.requires_grad_(not unused and not any(fnmatch(name, pattern) for pattern in spec.train.frozen))
    return model


def _load_start(model: NormFreePreTrainedModel, spec: RunSpec, corpus: Corpus) -> None:
    start = read_start(spec.start)
    if start is None or start.sha256 != spec.start_sha256:
        raise ValueError(f"start={spec.start} has other weights than when this run began; give tag=NAME for a new run")
    reads_text = model.main_input_name == "input_ids"
    known = [tokenizer_hash(each()) for each in (corpus.tokenizer, corpus.processor)] if reads_text else []
    if reads_text and tokenizer_hash(load_tokenizer(str(start.folder))) not in known:
        advice = f"give data.tokenizer={start.folder}"
        raise ValueError(f"start={spec.start} has another tokenizer than this corpus: {advice}")
    auto = getattr(transformers, HEADS[model.config.family].__name__.replace("NormFreeFor", "AutoModelFor"))
    theirs = auto.from_pretrained(start.folder, dtype=torch.float32)
    needed = model.config.vocab_size
    if reads_text and (known := theirs.config.vocab_size) < needed:  # a longer block has more sentinels
        needs = f"data.context={spec.data.context} needs {needed} tokens with its sentinels"
        raise ValueError(f"{needs}, and start={spec.start} has {known}: give a shorter data.context")
    weights = (theirs if isinstance(theirs, NormFreePreTrainedModel) else convert(theirs)).state_dict()
    if not reads_text and theirs.config.id2label != model.config.id2label:  # other classes have a new head
        weights = {name: weight for name, weight in weights.items() if not name.startswith("classifier.")}
    _cut_positions(weights, model.config, spec.start)
    if model.config.norm == "taper":  # an RMSNorm calls its gain weight
        weights = {re.sub(r"(\.layers\..*norm\.)weight", r"\1gain", name): each for name, each in weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    new = {name for name, _ in model.named_buffers()}
    new |= {f"{head}.{name}" for head in ("score", "classifier") for name in ("weight", "bias")}
    if wrong := sorted((set(missing) - new) | set(unexpected)):
        raise ValueError(f"start={spec.start} does not fit this model: {', '.join(wrong[:3])}")
    logger.info("%s: weights of %s", spec.name, start.name)


def _cut_positions(weights: dict[str, Tensor], config: NormFreeConfig, start: str) -> None:
    """Cut what is learned for each position to the positions of `config`. Raises ValueError where these are more."""
    wanted = config.max_position_embeddings
    for name, weight in weights.items():
        if name.endswith("positions.vectors.weight"):
            rows_PX = weight
        elif name.endswith("temperature.value") and config.attention_temperature == "position":
            rows_PX = weight.view(config.num_attention_heads, -1).T
        else:
            continue
        if wanted > len(rows_PX):
            raise ValueError(f"data.context={wanted} is beyond the {len(rows_PX)} learned positions of start={start}")
        weights[name] = rows_PX[:wanted] if weight.dim() == 2 else rows_PX[:wanted].T.flatten()
