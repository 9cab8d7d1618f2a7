"""The truth about a run: frozen dataclasses that check types and values when they are built.

`RunSpec.model` stays a dict: its fields are declared once, in `normfree.model.configuration`, and checked there.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic_core import to_jsonable_python

from normfree.files import fingerprint
from normfree.spec.families import CLASSIFICATIONS, FAMILIES
from normfree.spec.keys import build, nearest

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

# Fields of the model that a variant's name and label cover; a tag names differences in the values below.
LABEL_FIELDS = (
    *("norm", "final_norm", "activation", "learnable_slope", "placement", "query_key_norm", "branch"),
    *("embedding_scale", "linear", "linear_groups", "attention_temperature", "attention_sink", "attention_gate"),
)
REMOVAL_FIELDS = ("taper_start_step", "taper_end_step", "fake_start_step", "fake_gap_steps")
VALUE_FIELDS = ("negative_slope", "norm_steepness", "post_share", *REMOVAL_FIELDS)
# What tells one variant from another under one recipe: tables compare over these and nothing else.
VARIANT_FIELDS = (
    *(f"model.{name}" for name in (*LABEL_FIELDS, *VALUE_FIELDS)),
    *(f"train.{name}" for name in ("decay_slopes", "slope_learning_rate_factor")),
)
# Names, and the seeds: other weights and another order of the data are replicates of one recipe.
NOT_RECIPE_FIELDS = ("study", "variant", "label", "tag", "seed", "data_seed", "start", "start_sha256")
# Where the text and its tokenizer lie: what they are, the fingerprint of the corpus says.
PLACES_OF_TEXT = ("data.paths", "data.validation_paths", "data.tokenizer")
# How a run is watched, placed and cut into passes: its numbers depend on these by rounding and dropout masks only.
NOT_DECIDING = (
    *(f"train.{name}" for name in ("trackers", "threads", "log_every", "checkpoint_every", "checkpoints_kept")),
    *(f"train.{name}" for name in ("micro_batch_sequences", "gradient_checkpointing", "sharding")),
    *("data.expected_fingerprint", "probe.measures", "compare_across", "start", *PLACES_OF_TEXT),
)
# They may change within a run; tables over training compare runs that were measured at the same steps.
WHEN_MEASURED = ("train.evaluate_every", "probe.every_steps")

# YAML reads tag=100 and study=2024 as numbers; they are names.
_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True)

# Keys of a run that a group of the configuration sets, with others (data=files), or that stand for many.
NOT_SET_ALONE = ("model", "preset", "variant", "label", "data.source", "start_name", "start_sha256")

_SOURCES_THAT_READ = {
    "paths": ("files", "images", "fashion_mnist"),
    "validation_paths": ("files", "images"),
    **dict.fromkeys(("tokenizer", "packing", "max_bytes", "max_bytes_per_package"), FAMILIES["decoder"].sources),
    "column": ("files", "hub", "codeparrot"),
    **dict.fromkeys(("dataset", "dataset_config", "validation_dataset"), ("hub", "hub_images", "codeparrot")),
    **dict.fromkeys(("train_split", "validation_split"), ("hub", "hub_images", "codeparrot")),
}


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataSpec:
    """Which text, cut into which tokens, or which images: what decides the corpus fingerprint, and the expected one.

    `paths`, `validation_paths` and `tokenizer` decide by what their files hold, wherever these lie.
    """

    source: Literal["installed", "codeparrot", "hub", "files", "fashion_mnist", "images", "hub_images"] = "installed"
    """Python code on this machine, the paper's data sets, any Hugging Face data set, or local files; images."""
    paths: tuple[str, ...] = ()
    """data=files: training folders or globs of .py, .txt, .jsonl, .parquet; data=images: folders with a subfolder of
    images for each class; data=fashion_mnist: the folder of its four files, unless Debian's package is installed."""
    validation_paths: tuple[str, ...] = ()
    """data=files, images: the same for validation; empty holds out a twentieth of `paths` (docs/data.md)."""
    dataset: str | None = None
    """data=hub, hub_images: name on the hub, or a local folder."""
    dataset_config: str | None = None
    """data=hub, hub_images: the configuration of that data set, if it has several."""
    validation_dataset: str | None = None
    """Where the validation split lies; empty means in `dataset`."""
    train_split: str = "train"
    """data=hub, hub_images, codeparrot: the split to train on."""
    validation_split: str = "validation"
    """data=hub, hub_images, codeparrot: the held-out split."""
    column: str = "content"
    """The column that holds the text (.jsonl, .parquet and hub data sets)."""
    tokenizer: str | None = None
    """Folder or hub name; empty trains a byte-level BPE on the training split."""
    vocab_size: int = 2048
    """Pieces of the tokenizer that is trained here."""
    context: Annotated[int, Field(ge=2)] = 128
    """Tokens in a block, T; for images it follows from the model's sizes."""
    packing: Literal["windows", "concatenate", "docstring"] = "windows"
    """windows: per document, tail dropped, no end token (the paper's); concatenate: end token between documents;
    docstring: a function of Python code as source, the first line of its docstring as target (docs/data.md)."""
    max_bytes: Count | None = None
    """At most this many bytes of training text, in a fixed order."""
    max_bytes_per_package: Count | None = None
    """data=installed: no package gives more than this, so that none dominates."""
    train_documents: Count | None = None
    """At most this many training documents after the shuffle, or images."""
    validation_documents: Count | None = None
    """At most this many validation documents after the shuffle, or images."""
    shuffle_seed: int = 0
    """Order in which documents are taken (not the order of training; that is data_seed)."""
    expected_fingerprint: str | None = None
    """Fingerprint of the corpus behind the committed results; tables say so when yours differs."""

    def __post_init__(self) -> None:
        if self.source == "files" and not self.paths:
            raise ValueError("data=files needs data.paths, e.g. 'data.paths=[corpus/*.py]'")
        if self.source == "images" and not self.paths:
            raise ValueError("data=images needs data.paths, e.g. data.paths=[FOLDER] with a subfolder for each class")
        examples = {"hub": "roneneldan/TinyStories", "hub_images": "ylecun/mnist"}
        if self.source in examples and not self.dataset:
            example = examples[self.source]
            raise ValueError(f"data={self.source} needs data.dataset, e.g. data.dataset={example}")
        for name in ("tokenizer", "dataset", "validation_dataset"):
            if (place := getattr(self, name) or "").startswith("~"):
                object.__setattr__(self, name, str(Path(place).expanduser()))
        for name, sources in _SOURCES_THAT_READ.items():
            if getattr(self, name) != getattr(type(self), name) and self.source not in sources:
                allowed = " or ".join(f"data={source}" for source in sources)
                raise ValueError(f"data.{name} is not read with data={self.source}: leave it out, or give {allowed}")
        if self.packing == "docstring" and self.context < 8:
            raise ValueError(f"data.packing=docstring needs data.context of 8 or more, got {self.context}")
        if self.tokenizer is None and self.vocab_size < 257:
            raise ValueError(f"data.vocab_size={self.vocab_size}: 256 bytes and an end token make it 257 or more")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainSpec:
    """How the model is trained. Batches count sequences of `data.context` tokens."""

    steps: Count | None = None
    """Optimiser steps; give this or `epochs`."""
    epochs: Positive | None = None
    """Passes over the training blocks; give this or `steps`."""
    batch_sequences: Count = 32
    """Sequences per optimiser step, over all processes and accumulation."""
    micro_batch_sequences: Count = 32
    """Sequences per forward pass of one process."""
    peak_learning_rate: Positive = 1e-3
    """AdamW's, at the end of the warm-up."""
    final_learning_rate: NotNegative = 1e-7
    """Where its linear fall ends, after the last step."""
    warmup_share: BelowOne = 0.05
    """Share of the steps in which the learning rate rises linearly; then it falls linearly."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the blocks, AdamW for all other parameters."""
    objective: Literal["next_token", "entropy_target", "entropy_band", "syntax_error", "token_type"] = "next_token"
    """What is minimised: the loss alone, with a term that moves head entropies (docs/architecture.md), or instead that
    of a classification head on the body (docs/tasks.md)."""
    entropy_weight: NotNegative | None = None
    """objective=entropy_target, entropy_band: weight of the term; 0 only records entropies against their targets."""
    entropy_layers: tuple[int, ...] | None = None
    """objective=entropy_target, entropy_band: layers whose heads are moved, from 0; unless given, all."""
    entropy_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """objective=entropy_target: the target of every head, as a share of the ceiling ln(T!) / T."""
    entropy_nats: tuple[float, ...] = ()
    """objective=entropy_target: the target of each layer's heads, in nats."""
    entropy_profile: tuple[str, ...] = ()
    """objective=entropy_target: finished runs whose entropies, sorted within each layer and step, are the targets."""
    entropy_profile_layers: tuple[int, ...] = ()
    """objective=entropy_target: layers of those runs whose entropies go to entropy_layers, in this order; unless given,
    the same."""
    weight_decay: NotNegative = 0.1
    """AdamW's, on matrices and embeddings; never on biases and norms."""
    decay_slopes: bool | Positive = False
    """Also decay learnable slopes, as the official code does: over gpt2-t128's schedule that alone shrinks one to 0.2
    times its value, over cpu's to 0.78 times. A number is their own weight decay: 0.65 shrinks as much over cpu's."""
    slope_learning_rate_factor: NotNegative = 1.0
    """Learning rate of the slopes as a multiple of everybody else's."""
    adam_beta1: BelowOne = 0.9
    """Decay of AdamW's average of gradients, a step."""
    adam_beta2: BelowOne = 0.999
    """Decay of AdamW's average of squared gradients, a step."""
    adam_epsilon: Positive = 1e-8
    """What AdamW adds to the root of that average."""
    max_gradient_norm: Positive = 1.0
    """A gradient whose L2 norm over all parameters is larger is scaled down to it; 1e9 leaves all as they are."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32, or autocast in bf16 or fp16 over fp32 weights (fp16 needs a GPU)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, slower."""
    sharding: Literal["none", "ddp", "fsdp"] = "none"
    """none: every process holds the whole model (ddp: and one alone is refused); fsdp: each holds a part (FSDP2)."""
    compile: Literal[False, True, "cuda_graph"] = False
    """torch.compile the model; cuda_graph also replays its kernels as CUDA graphs (one pass a step, not measured)."""
    sigma_weight: NotNegative = 0.0
    """Weight in the loss of the variance, over a sequence's tokens, of what the final norm divides by."""
    frozen: tuple[str, ...] = ()
    """Parameters that keep their values, as patterns of names, e.g. ['*embed_tokens*']."""
    on_nonfinite: str = "stop"
    """A step whose loss or gradient is not finite: `stop` records the run as diverged, `skip:N` leaves out up to N."""
    evaluate_every: Count = 500
    """Steps between evaluations on the validation split."""
    evaluation_sequences: Count | None = None
    """Validation sequences used while training; the final evaluation always takes all."""
    log_every: Count = 10
    """Steps between lines of loss, learning rate, gradient norm and tokens per second."""
    checkpoint_every: Count = 500
    """Steps between checkpoints, from which a run goes on after a kill."""
    checkpoints_kept: Count = 2
    """The newest of them stay on disk."""
    threads: Count | None = None
    """CPU threads; unless given, every core this process may use."""
    trackers: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = ()
    """Also report losses, perplexity, learning rate and gradient norm there (an optional extra: docs/training.md)."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            values = f"got steps={self.steps} and epochs={self.epochs}; train.steps=null or train.epochs=null frees one"
            raise ValueError(f"give exactly one of train.steps and train.epochs, {values}")
        batch, micro = self.batch_sequences, self.micro_batch_sequences
        if batch % micro:
            raise ValueError(f"train.batch_sequences={batch} must be a multiple of train.micro_batch_sequences={micro}")
        final, peak = self.final_learning_rate, self.peak_learning_rate
        if final > peak:
            raise ValueError(f"train.final_learning_rate={final} must be at most train.peak_learning_rate={peak}")
        self._check_objective()
        if not re.fullmatch(r"stop|skip:[1-9][0-9]*", self.on_nonfinite):
            raise ValueError(f"train.on_nonfinite={self.on_nonfinite!r}; allowed: stop, or skip:N with N of 1 or more")

    def _check_objective(self) -> None:
        both, targets = ("entropy_weight", "entropy_layers"), ("entropy_share", "entropy_nats", "entropy_profile")
        for name in (*both, *targets, "entropy_profile_layers"):
            readers = ("entropy_target", "entropy_band") if name in both else ("entropy_target",)
            if (value := getattr(self, name)) not in (None, ()) and self.objective not in readers:
                advice = f"give train.objective={' or '.join(readers)}"
                raise ValueError(f"train.{name}={value} is not read with train.objective={self.objective}: {advice}")
        if self.objective.startswith("entropy") and self.entropy_weight is None:
            raise ValueError(f"train.objective={self.objective} needs train.entropy_weight, e.g. 0.03")
        chosen = [f"train.{name}" for name in targets if getattr(self, name)]
        if self.objective == "entropy_target" and len(chosen) != 1:
            names = "train.entropy_share, train.entropy_nats and train.entropy_profile"
            got = " and ".join(chosen) or "none"
            raise ValueError(f"train.objective=entropy_target needs exactly one of {names}, got {got}")
        if self.entropy_profile_layers and not self.entropy_profile:
            raise ValueError("train.entropy_profile_layers is read with train.entropy_profile: give both")

    @property
    def skips_allowed(self) -> int:
        """Non-finite steps that may be left out before the run counts as diverged."""
        return int(self.on_nonfinite.partition(":")[2] or 0)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ProbeSpec:
    """When and on how much held-out text the heads are measured."""

    measures: tuple[str, ...] = (
        *("heads", "slopes", "sinks", "logits", "residual", "ranges", "losses"),
        *("spectrum:x25", "selectivity:x25", "propagation:x25"),
    )
    """What is measured (docs/quantities.md): NAME, NAME:STEPS for a period of its own, NAME:x25 for every 25th time."""
    every_steps: Count = 100
    """Steps between measurements."""
    sequences: Count = 64
    """Size of the fixed held-out batch."""
    final_sequences: Count = 1000
    """Held-out sequences measured once, after the last step, by all but rarer measures; heatmaps use these."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RunSpec:
    """One training run, completely."""

    study: str = "single"
    """Folder of runs that belong together; a name only, `normfree study NAME` is what takes a study's settings."""
    preset: str
    variant: str
    label: str
    """The variant in the paper's notation, as tables print it."""
    tag: str = ""
    """Tells apart runs of one variant and seed, e.g. a second learning rate; part of the folder name."""
    seed: Seed = 0
    """Initial weights and dropout."""
    data_seed: Seed = 0
    """Order of the training blocks, so that variants and seeds can share it."""
    start: str = "random"
    """Weights to begin with: random, run:FOLDER, or model:NAME (one of ours, a GPT-2, GPT-NeoX, ViT or T5)."""
    start_name: str = "random"
    """Which run, without its seed, or model `start` is; read from it."""
    start_sha256: str = ""
    """sha256 of its weights."""
    compare_across: tuple[str, ...] = ()
    """Keys in which variants of one table may differ, e.g. train.peak_learning_rate, or start_name, the run that each
    began with: each variant has its own value."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of NormFreeConfig."""
    data: DataSpec = field(default_factory=DataSpec)
    train: TrainSpec
    probe: ProbeSpec = field(default_factory=ProbeSpec)

    def __post_init__(self) -> None:
        for name in ("study", "variant", "tag"):
            if re.search(r"[/\\\0]|^\.{1,2}$", value := getattr(self, name)):
                raise ValueError(f"{name}={value!r} becomes part of a folder name: no slash, no dots alone")
        if (family := FAMILIES.get(name := self.model.get("family", "decoder"))) is None:
            raise ValueError(f"model.family={name!r}; {nearest(str(name), list(FAMILIES))}")
        if self.data.source not in family.sources:
            allowed = " or ".join(f"data={source}" for source in family.sources)
            raise ValueError(f"data={self.data.source} is not read with model.family={name}: give {allowed}")
        if self.data.packing == "docstring" and name != "encoder_decoder":
            raise ValueError(f"data.packing=docstring is for model.family=encoder_decoder (preset=denoise), not {name}")
        if (objective := self.train.objective) not in family.objectives:
            allowed = " or ".join(other for other, kind in FAMILIES.items() if objective in kind.objectives)
            raise ValueError(f"train.objective={objective} is for model.family={allowed}, not {name}")
        if self.train.sigma_weight and (name == "encoder_decoder" or objective in CLASSIFICATIONS):
            work = f"model.family={name}" if name == "encoder_decoder" else f"train.objective={objective}"
            raise ValueError(f"train.sigma_weight={self.train.sigma_weight} does not work with {work}: leave it out")
        chosen = f"norm={self.model.get('norm')}", f"sharding={self.train.sharding}"
        if objective in CLASSIFICATIONS and (bad := {"norm=fake", "norm=taper", "sharding=fsdp"}.intersection(chosen)):
            raise ValueError(f"train.objective={objective} does not work with {bad.pop()}: run the two after another")

    @property
    def name(self) -> str:
        """Name of the run's folder, unique within its study."""
        return "-".join(part for part in (self.variant, self.tag, f"seed{self.seed}") if part)

    @property
    def places_of_text(self) -> tuple[Any, ...]:
        """Values of `PLACES_OF_TEXT`, but for the tokenizer of a start, whose weights decide."""
        keys = [key.removeprefix("data.") for key in PLACES_OF_TEXT]
        return tuple(getattr(self.data, key) for key in keys if key != "tokenizer" or self.start == "random")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for run.json."""
        return to_jsonable_python(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a spec. Raises ValueError that names every mistake and the nearest valid key."""
        return build(cls, values)

    def recipe(self) -> str:
        """`recipe_of` this spec."""
        return recipe_of(self.to_dict())

    def identity(self) -> str:
        """Fingerprint of all but the text that decides the run's numbers; a folder holds one identity only."""
        return fingerprint(self.deciding())

    def deciding(self) -> dict[str, Any]:
        """Plain values of all but the text that decides the run's numbers."""
        return _without(self.to_dict(), (*NOT_DECIDING, *WHEN_MEASURED))


def recipe_of(spec: Mapping[str, Any]) -> str:
    """Fingerprint of a spec (as run.json has it) without variant, seeds, text and what does not decide the numbers."""
    return fingerprint(_without(spec, (*NOT_RECIPE_FIELDS, *VARIANT_FIELDS, *NOT_DECIDING, *own_values(spec))))


def own_values(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A spec's values of the keys that it compares across, by key; older records compare across none."""
    parts = {key: key.partition(".") for key in spec.get("compare_across", ())}
    return {key: spec[part].get(name) if name else spec.get(part) for key, (part, _, name) in parts.items()}


def check_own_values(specs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ValueError where runs of one variant and tag, by name, differ in a key of `compare_across`."""
    (first, spec), *others = specs.items()
    for name, other in others:
        if (theirs := own_values(other)) != (ours := own_values(spec)):
            raise ValueError(f"{first} and {name} are one variant and tag, but have {ours} and {theirs}: change a tag")


def _without(spec: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {
        name: {k: v for k, v in value.items() if f"{name}.{k}" not in keys} if isinstance(value, Mapping) else value
        for name, value in spec.items()
        if name not in keys
    }
