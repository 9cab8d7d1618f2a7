"""What runs and studies are said to need, against real models, autograd's saved tensors and torch's allocator."""

import gc
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from docs.kept import saved_bytes
from normfree.cost import estimate
from normfree.cost.estimate import GIB, NORMS, check_memory, find_gpu, peak_memory, sizes_of
from normfree.cost.training import describe_training_cost, training_flops
from normfree.measures import held_out
from normfree.model import NormFreeConfig, NormFreeForCausalLM, attention, loss
from normfree.model.activations import IN_THIS_FILE as ACTIVATIONS
from normfree.model.norms import IN_THIS_FILE as MODEL_NORMS
from normfree.spec.compose import compose_run, members
from normfree.spec.run import RunSpec
from normfree.spec.study import load_study
from normfree.training import arguments, train

TAPER = ["model.taper_end_step=5"]
SCHEDULES = {"taper": TAPER, "fake": ["model.fake_start_step=2"]}
OTHER_FAMILIES = ("fashion-vit", "denoise")
VARIANTS = "sm-r sm-ln-rg sm-rms-g sm-lns-g sm-dyt-g sm-derf-g sm-bhyt-g sm-ln-peri-g leaky-per-layer leaky-shared"
WIDTH, TOKENS, BATCH = 64, 521, 2


def model_of(spec: RunSpec, **fields: Any) -> NormFreeForCausalLM:
    sizes = {"vocab_size": spec.data.vocab_size, "max_position_embeddings": spec.data.context}
    config = NormFreeConfig(**{**sizes, **spec.model, **fields})
    return NormFreeForCausalLM._from_config(config, attn_implementation="sdpa")


def test_constants_are_those_of_the_package() -> None:
    largest = {"cpu": loss.LARGEST_LOGITS, "gpu": loss.LARGEST_LOGITS_ON_GPU}
    assert (loss.LARGEST_BLOCK, largest) == (estimate.LOSS_ROWS, estimate.LOSS_LOGITS)
    assert estimate.LONGEST_WRITTEN_OUT == attention.LONGEST_WRITTEN_OUT
    largest = {"cpu": held_out.LARGEST_LOGITS, "gpu": held_out.LARGEST_LOGITS_ON_GPU}
    assert largest == estimate.EVALUATION_LOGITS
    assert NORMS.keys() == MODEL_NORMS.keys()


@pytest.mark.parametrize(
    "words",
    [
        *([f"preset={name}", "data.tokenizer=null"] for name in members("preset") if name not in OTHER_FAMILIES),
        *([f"variant={name}"] for name in VARIANTS.split()),
        ["variant=sm-taper-g", *TAPER],
        ["variant=sm-r", "model.bias=none", "model.tie_word_embeddings=false", "model.intermediate_size=100"],
        ["variant=sm-r", "model.bias=all", "model.position=rotary", "model.residual=parallel"],
    ],
    ids=" ".join,
)
def test_parameters_are_those_of_the_model(words: list[str]) -> None:
    spec = compose_run(words).spec
    with torch.device("meta"):
        model = model_of(spec)
    assert sizes_of(spec).parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "words",
    [
        *([f"model.norm={name}", *(SCHEDULES.get(name, []))] for name in NORMS),
        *(["model.norm=none", f"model.activation={name}"] for name in ACTIVATIONS),
        ["model.norm=layernorm", "model.placement=post"],
        ["model.norm=none", "model.position=rotary"],
        ["model.norm=none", "model.residual=parallel"],
        ["model.norm=none", "model.intermediate_size=96"],
        ["model.norm=none", "data.context=127"],
    ],
    ids=lambda words: " ".join(words),
)
def test_kept_bytes_are_those_that_autograd_saves(words: list[str], precision: str) -> None:
    sizes = [f"model.hidden_size={WIDTH}", "model.num_attention_heads=2", "data.vocab_size=300"]
    base = ["variant=custom", "tag=x", "model.activation=relu", f"data.context={TOKENS}", *sizes]
    spec = compose_run([*base, f"train.precision={precision}", *words]).spec
    size, casts = sizes_of(spec, "cpu"), precision == "bf16"
    models = (model_of(spec, num_hidden_layers=layers, activation=spec.model["activation"]) for layers in (2, 3))
    two, three = (saved_bytes(model.config, BATCH, spec.data.context, autocast=casts) for model in models)
    of_layer = three - two - 2 * size.projections * casts
    assert size.layer_keeps == pytest.approx(of_layer / (BATCH * spec.data.context * WIDTH), rel=0.02)


def peak_of_allocator(work: Callable[[], Any]) -> int:
    """The most bytes that torch's CPU allocator had handed out at once, from its own events: the same in each run."""
    gc.collect()  # what is freed now would count against the peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    results = recorded.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    changes = sorted((each.start_ns(), each.nbytes()) for each in results.events() if each.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["variant=sm-r", "model.num_hidden_layers=6", "model.hidden_size=128", "data.context=128"],
        ["variant=sm-ln-g", "model.num_hidden_layers=4", "model.hidden_size=256", "train.precision=bf16"],
        ["variant=sm-rms-g", "model.num_hidden_layers=5", "model.hidden_size=192", "train.gradient_checkpointing=true"],
    ],
    ids=["128 wide", "256 wide", "192 wide, checkpointing"],
)
def test_peak_memory_is_that_of_a_whole_training(tiny_spec, words, tmp_path: Path, cache: Path) -> None:
    """With probes, evaluation and saving. Measured ratios: 0.99 to 1.01."""
    sizes = ["data.context=256", "train.batch_sequences=8", "train.micro_batch_sequences=4", "data.vocab_size=512"]
    often = ["train.steps=2", "model.initializer_range=0.02", "probe.sequences=4", "probe.final_sequences=4"]
    spec = tiny_spec(*sizes, *often, "model.num_attention_heads=4", *words)
    measured = peak_of_allocator(lambda: train(spec, runs_dir=tmp_path, cache=cache, progress=False))
    assert sum(peak_memory(spec, device="cpu")[1].values()) == pytest.approx(measured, rel=0.1)


def estimate_of(*words: str, processes: int = 1) -> float:
    spec = compose_run(["preset=gpt2-1.3b", *words]).spec
    return sum(peak_memory(spec, processes=processes)[1].values()) / GIB


def test_sharding_divides_sixteen_bytes_a_parameter() -> None:
    """Against DDP, which holds all of them and as many bytes again in its buckets."""
    eight = {name: estimate_of(f"train.sharding={name}", processes=8) for name in ("ddp", "fsdp")}
    states = 16 * 1_313_282_048 / GIB
    assert eight["ddp"] - estimate_of() == pytest.approx(states / 4, rel=1e-6)
    assert estimate_of("train.sharding=fsdp", processes=64) < eight["fsdp"] < eight["ddp"] - states * 3 / 4


def test_estimate_prints_the_parts_without_torch() -> None:
    words = ["estimate", "preset=gpt2-1.3b", "gpus=8", "train.sharding=fsdp", "tokens=2.1e9"]
    code = f"import sys; from normfree.cli.main import main; main({words}); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gpt2-1.3b SM+LN+G: 1,313,282,048 parameters, 8.47e+09 FLOPs of training a token\n")
    spec = compose_run(["preset=gpt2-1.3b"]).spec
    hours = training_flops(spec, 2.1e9) / (0.4 * 989e12) / 3600
    assert f"2,100 M tokens: {int(hours / 8)} h" in done.stdout
    assert f", {hours:.2f} GPU-hours\n" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if "GiB" in line]
    *parts, together = [float(row[row.index("GiB") - 1]) for row in rows]
    assert sum(parts) == pytest.approx(together, abs=0.05)


def test_what_is_not_counted_is_named(run) -> None:
    assert "not counted" not in run("estimate")[1]
    out = run("estimate", "variant=sm-qk-g", "train.objective=entropy_band", "train.entropy_weight=1")[1]
    assert out.endswith("not counted: model.query_key_norm=rmsnorm, train.objective=entropy_band\n")


def test_a_gpu_is_found_by_the_name_that_torch_gives() -> None:
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "Tesla T4")
    assert [find_gpu(name) for name in names] == ["h100", "h200", "a100-40gb", "a100", None]


def test_a_gpu_that_is_too_small_is_refused_with_numbers(tiny_spec) -> None:
    spec = compose_run(["preset=gpt2-1.3b"]).spec
    check_memory(spec, 79, name="h100")
    with pytest.raises(ValueError, match=r"this run needs about [0-9.]+ GiB, and x has 20\.0 .*: give a smaller"):
        check_memory(spec, 20, name="x")
    with pytest.raises(ValueError, match=r"workers=9: 9 runs of 1\.0 GiB need 9\.\d GiB, .*: give workers=3 or fewer"):
        check_memory(tiny_spec(), 4, name="x", runs=9)
    check_memory(compose_run(["preset=fashion-vit"]).spec, 4, name="x", runs=9)  # not known of other families


def test_training_on_a_gpu_says_what_it_needs(tiny_spec, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(arguments, "PartialState", lambda: SimpleNamespace(num_processes=1, is_main_process=True))
    facts = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=79.1 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    corpus: Any = SimpleNamespace(vocab_size=300, train=range(1000))
    with caplog.at_level("INFO", "normfree"):
        arguments.announce_needs(tiny_spec(), corpus, torch.device("cpu"))
        assert not caplog.text
        arguments.announce_needs(tiny_spec(), corpus, torch.device("cuda"))
    assert "each of 1 NVIDIA H100 80GB HBM3: fp32" in caplog.text
    assert f"GiB of {79.1:g} GiB: fits" in caplog.text
    facts.total_memory = GIB
    with pytest.raises(ValueError, match=r"NVIDIA H100 80GB HBM3 has 1\.0"):
        arguments.announce_needs(tiny_spec(), corpus, torch.device("cuda"))


def test_the_gate_of_a_gated_part_is_trained_too() -> None:
    estimated, counted = [], []
    for form in ("plain", "gated"):
        spec = compose_run(["preset=cpu-quick", f"model.feed_forward={form}"]).spec
        model = NormFreeForCausalLM(NormFreeConfig(**spec.model, vocab_size=61))
        with FlopCounterMode(display=False) as counter:
            model(torch.arange(50)[None])
        estimated.append(training_flops(spec, 50))
        counted.append(3 * counter.get_total_flops())  # the backward pass has twice the products of the forward one
    assert estimated[1] - estimated[0] == pytest.approx(counted[1] - counted[0], rel=1e-12)
    assert counted[1] > counted[0]


RESULTS = Path(__file__).parents[2] / "results"
WEIGHTS = {"paper-gpt2": 12 * 12 * 768**2 + 768 * 50257, "paper-pythia": 6 * 12 * 512**2 + 512 * 50257}
ATTENTION = {"paper-gpt2": 12 * 12 * 768 * 128, "paper-pythia": 12 * 6 * 512 * 128}


@pytest.mark.parametrize(("name", "hours"), [("paper-gpt2", "4.53"), ("paper-pythia", "1.64")])
def test_a_paper_study_states_its_gpu_hours(name: str, hours: str) -> None:
    study = load_study(name)
    jobs = study.jobs()
    for job in jobs:
        assert training_flops(job.spec, 10) == pytest.approx(10 * (6 * WEIGHTS[name] + ATTENTION[name]), rel=1e-12)
    line = describe_training_cost(jobs, study.tokens_per_epoch)
    assert line.startswith("4 runs, 8,550.4 M tokens, ")
    assert f"; {hours} GPU-hours at 40% of an H100's bf16 peak (989 TFLOP/s)" in line
    unknown = "4 runs; they count epochs, whose tokens are unknown until the corpus is prepared"
    assert describe_training_cost(jobs) == unknown


def test_a_cpu_study_states_a_time_from_records_only(tmp_path: Path) -> None:
    jobs = load_study("quick").jobs({"runs_dir": str(tmp_path)})
    line = describe_training_cost(jobs)
    assert line.startswith("4 runs, 4.1 M tokens, ")
    assert "hours" not in line
    assert "left" not in line
    shutil.copytree(RESULTS / "quick" / "sm-g-seed0", tmp_path / "quick" / "sm-g-seed0")
    assert "min" in describe_training_cost(jobs).partition("; ")[2]
