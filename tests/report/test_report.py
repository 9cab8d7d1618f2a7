"""What `build_report` writes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from normfree import Run, build_report, find_runs
from normfree.analysis import published
from normfree.analysis.entropy import causal_ceiling
from normfree.analysis.groups import group_runs
from normfree.report.build import number_frames
from normfree.report.figures import PageFigure
from normfree.report.sections import figures_of
from normfree.report.summary import sentences
from normfree.report.tables.results import range_table
from tests.synthetic import rewritten, write_run

FOUR = ("SM+LN+G", "SM+LN+R", "SM+G", "SM+R")


def test_models_in_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    facts = {"kind": "measurement"}
    runs = [write_run(tmp_path / name, label, facts=facts) for name, label in (("a", "SM+R"), ("b", "SM+R"))]
    assert [group.name for group in group_runs(runs)] == [f"SM+R ({n}/quick/sm-r-seed0)" for n in "ab"]
    frame = number_frames(runs)["heads"]
    assert len(frame) == 2 * 16
    assert frame["run"].nunique() == 2


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def figure_named(name: str, runs: list[Run], *, mix: bool = False) -> PageFigure:
    (figure,) = (figure for figure in figures_of(group_runs(runs, mix=mix)) if figure.name == name)
    return figure


def limit_of_key(figure: PageFigure) -> tuple[float, float]:
    part = figure.key_part()
    assert part is not None
    return part.axes[0].get_xlim()


def test_open_figures_and_every_table_are_also_files(report: Path) -> None:
    figures = {"entropy_nats-heads", "entropy_nats-means", "entropy_nats-differences", "perplexity"}
    names = {"perplexity", "differences", "gap", "claims", "overload", "ranges", "verdicts", "runs", "slopes"}
    names |= {"perplexity-communication"}
    expected = {f"figures/{name}.{suffix}" for name in figures for suffix in ("pdf", "png")}
    expected |= {f"tables/{name}.{suffix}" for name in names for suffix in ("md", "tex", "csv")}
    expected |= {"numbers/runs.csv", "numbers/layers.csv", "numbers/heads.csv"}
    assert set(contents(report)) == expected | {"index.html", "report.json"}
    assert set(json.loads((report / "report.json").read_text())) == set(contents(report)) - {"report.json"}


def test_all_figures_can_be_files(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "SM+G"), write_run(tmp_path, "SM+R", train={"peak_learning_rate": 7e-3})]
    build_report(runs, tmp_path / "out", mix=True, all_figures=True)
    names = {path.stem for path in (tmp_path / "out" / "figures").iterdir()}
    figures = ("entropy_nats-heads", "losses", "overload")
    assert names >= {part + name for part in ("part1-", "part2-") for name in figures}


def test_numbers_are_as_measured(report: Path) -> None:
    runs, heads = (pd.read_csv(report / "numbers" / f"{name}.csv") for name in ("runs", "heads"))
    assert set(heads.run) < set(runs.run)
    assert str(report.parent) not in (report / "numbers" / "runs.csv").read_text()
    sm_g = runs[runs.label == "SM+G"]
    assert sm_g.perplexity.tolist() == [37.7, 37.7 * 1.01]
    diverged = runs[runs.label == "SM"]
    assert diverged.perplexity.isna().all()
    assert diverged.diverged_at.tolist() == [100]
    assert set(heads.label) == set(runs[runs.status == "finished"].label)
    found = heads[(heads.run == "quick/sm-g-seed1") & (heads.layer == 2)]
    recorded = find_runs([report.parent / "runs" / "quick" / "sm-g-seed1"])[0].last("final", "entropy_nats")
    assert found.entropy_nats.tolist() == recorded[2]
    assert np.allclose(found.share_of_ceiling, np.array(recorded[2]) / causal_ceiling(32))


def test_the_page_asks_for_nothing_from_outside(report: Path) -> None:
    text = (report / "index.html").read_text()
    assert """Content-Security-Policy" content="default-src 'none'; """ in text
    assert not re.search("<link|<iframe|@import", text)
    targets = re.findall(r'\b(?:src|href)="([^"]*)"', text)
    assert {target.partition(":")[0] for target in targets if target[0] != "#"} == {"data"}  # it is often shared alone


def test_ids_are_unique_and_references_resolve(report: Path) -> None:
    text = (report / "index.html").read_text()
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#|aria-labelledby=")([^")]+)', text)) <= set(ids)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text, re.DOTALL)
    assert len(captions) == len(re.findall('<figure [^>]*aria-label="[^"]+"', text)) == 11
    assert all(len(caption.strip()) > 40 for caption in captions)


def test_the_page_says_first_what_was_found(report: Path) -> None:
    text = (report / "index.html").read_text()
    marks = ('class="answer"', 'id="figure-perplexity"', 'id="figure-entropy_nats-heads"', 'id="claims"')
    places = [text.index(mark) for mark in (*marks, "<summary><h2")]
    assert places == sorted(places)
    for fact in ("normfree study quick", "torch 2.13.0", "2 cores", "fp32", "vocabulary 2,048", "demonstration"):
        assert fact in text
    assert published.SOURCE.replace("&", "&amp;") in text
    above = text.partition('class="answer"')[0]
    assert "SM is softmax attention, LN is LayerNorm inside the blocks, G is GELU and R is ReLU" in above
    assert "The unigram predicts every token by how often it occurs in the training text" in above


def test_finite_rows_and_missing_prices_are_notes(tmp_path: Path) -> None:
    sentence = "No probe of any run found an attention row with NaN or infinity."
    runs = [write_run(tmp_path / "runs", "SM+G"), write_run(tmp_path / "runs", "SM+R", broken_probe=True)]
    runs += [write_run(tmp_path / "runs", "SM+R2", model={"norm": "none", "activation": "squared_relu"})]
    for some, is_drawn in ((runs[::2], False), (runs, True)):
        page = build_report(some, tmp_path / "out").read_text()
        assert ('id="nonfinite"' in page, sentence in page) == (is_drawn, not is_drawn)
        assert "SM+R2 is left out: an operation of it has no price." in page


@pytest.mark.slow
def test_same_runs_give_same_bytes_and_stale_files_go(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "runs", "SM+G"), write_run(tmp_path / "runs", "SM+leaky, fixed")]
    output = tmp_path / "out"
    build_report(runs[:1], output)
    first = contents(output)
    (output / "figures" / "mine.txt").write_text("kept")
    build_report(runs, output)
    assert "tables/slopes.csv" in contents(output)
    build_report(runs[:1], output)
    assert contents(output) == {**first, "figures/mine.txt": b"kept"}


def test_labels_and_tags_are_text(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "runs", "<script>alert(1)</script>"), write_run(tmp_path / "runs", "SM", tag="lr$2^$")]
    page = build_report(runs, tmp_path / "out").read_text()
    assert page.count("<script") == 1  # its own
    assert "&lt;script&gt;alert(1)" in page
    assert "SM (lr$2^$)" in page


def test_a_broken_variant_leaves_the_colours_of_the_study(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "SM", broken_probe=True)]
    assert limit_of_key(figure_named("entropy_nats-heads", runs)) == (0, pytest.approx(causal_ceiling(32)))
    (panel,) = figure_named("entropy_nats-layers", runs).panels
    assert panel(ax=Figure().subplots()).get_ylim()[1] == pytest.approx(1.08 * causal_ceiling(32))


def test_the_paper_s_heads_stand_beside_its_own_shape_only(tmp_path: Path) -> None:
    rotary = write_run(tmp_path, "SM+G", model={"position": "rotary"})
    assert "published" in [figure.name for figure in figures_of(group_runs([write_run(tmp_path / "gpt2", "SM+G")]))]
    assert "published" not in [figure.name for figure in figures_of(group_runs([rotary]))]


def test_a_diverged_run_is_not_compared_with_the_paper(tmp_path: Path) -> None:
    """Its last probe shows heads that are hardly trained, so nearly uniform."""
    finished, diverged = write_run(tmp_path, "SM+G"), write_run(tmp_path, "SM+R", status="diverged")
    alone, both = range_table(group_runs([finished])), range_table(group_runs([finished, diverged]))
    assert both.rows == alone.rows
    assert "Not measured after training, so not counted: quick/sm-r-seed0." in both.notes
    figure = figure_named("published", [finished, diverged])
    titles = [panel(ax=Figure().subplots()).get_title() for panel in figure.panels]
    assert titles == ["SM+G, paper's GPT-2 125M", "SM+G, ours"]


def test_heads_of_mixed_contexts_are_shares_of_the_ceiling(tmp_path: Path) -> None:
    run, longer = write_run(tmp_path, "SM+G"), write_run(tmp_path, "SM+R", data={"context": 64})
    for runs, limit in (([run], causal_ceiling(32)), ([run, longer], 1.0)):
        figure = figure_named("entropy_nats-heads", runs, mix=True)
        assert limit_of_key(figure) == (0, pytest.approx(limit))


def test_a_running_run_is_in_curves_but_not_in_results(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "runs", "SM+G"), write_run(tmp_path / "runs", "SM+leaky, shared", status="running")]
    groups = group_runs(runs)
    drawn = {figure.name: figure for figure in figures_of(groups)}
    assert {len(drawn[name].panels) for name in ("entropy_nats-heads", "entropy_nats-layers")} == {2}
    assert "SM+leaky, shared (step 100)" in drawn["entropy_nats-heads"].caption
    for name in ("losses", "overload"):
        assert "open circle" in drawn[name].caption
        _, labels = drawn[name].panels[0](ax=Figure().subplots()).get_legend_handles_labels()
        assert labels == ["SM+G", "SM+leaky, shared"]
    assert len(drawn["negative_slope-layers"].panels) == 1
    page = build_report(runs, tmp_path / "out").read_text()
    assert "Not finished, so only in the curves: " in page
    assert "leaky" not in (tmp_path / "out" / "tables" / "perplexity.csv").read_text()


def test_a_table_on_the_page_contains_its_csv(report: Path) -> None:
    links = dict(re.findall(r'download="([^"]*)" href="[^,]*,([^"]*)"', (report / "index.html").read_text()))
    for name in ("perplexity.csv", "claims.tex", "runs.csv"):
        assert unquote(links[name]) == (report / "tables" / name).read_text()


def test_each_recipe_has_its_own_part_and_answer(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "runs", label, study="one") for label in ("SM+G", "SM+R")]
    for rate in (2e-3, 3e-3):
        train = {"peak_learning_rate": rate}
        runs += [write_run(tmp_path / f"{rate}", label, study="two", train=dict(train)) for label in ("SM+G", "SM+R")]
    page = build_report(runs, tmp_path / "out", mix=True).read_text()
    titles = ["one", "two: peak_learning_rate=0.002", "two: peak_learning_rate=0.003"]
    assert re.findall('<p class="kicker">(.*)</p>', page)[1:] == titles
    assert page.count('<p class="answer">Without LayerNorm, ReLU ends 4.2 % below GELU') == 3
    assert not (tmp_path / "out" / "figures").exists()
    assert page.index('<h2 id="rates">') < page.index('<p class="answer">')
    rates = pd.read_csv(tmp_path / "out" / "tables" / "rates.csv", index_col="Variant")
    assert rates.loc["SM+R"].tolist() == [36.1, 36.1, 36.1, 1, "1e-3, edge of the grid"]


def test_variants_with_own_rates_or_starts_are_compared(tmp_path: Path) -> None:
    rates = {"SM+G": 1.4e-3, "SM+R": 2e-3, "SM+LN+G": 2.8e-3}
    across: dict[str, Any] = {"compare_across": ["train.peak_learning_rate"]}
    runs = [write_run(tmp_path, name, train={"peak_learning_rate": rate}, **across) for name, rate in rates.items()]
    page = build_report(runs, tmp_path / "out").read_text()
    assert "Without LayerNorm (lr 2e-3), ReLU ends 4.2 % below GELU (lr 1.4e-3) in perplexity" in page
    assert "<dd>peak learning rates differ by variant</dd>" in page
    rows = pd.read_csv(tmp_path / "out" / "tables" / "perplexity.csv")
    assert rows.Variant.tolist() == ["SM+LN+G (lr 2.8e-3)", "SM+G (lr 1.4e-3)", "SM+R (lr 2e-3)", "Unigram"]
    assert rows["Against SM+LN+G"].tolist()[:2] == ["baseline", "+10.2 %"]
    own: dict[str, Any] = {"root": tmp_path / "2", "compare_across": ["start_name"]}
    runs = [write_run(label=label, start_name=f"quick/{label[-1]}", **own) for label in ("SM+G", "SM+R")]
    first = sentences(group_runs(runs))[0]
    assert first.startswith("Without LayerNorm (quick/R), ReLU ends 4.2 % below GELU (quick/G) in perplexity")


def test_all_variants_are_compared_with_the_baseline(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "runs", label) for label in ("SM+G", "SM+R", "SM+S")]
    page = build_report(runs, tmp_path / "out", baseline="SM+R").read_text()
    rows = pd.read_csv(tmp_path / "out" / "tables" / "differences.csv")
    assert rows.Comparison.tolist() == ["SM+G against SM+R", "SM+S against SM+R"]
    assert "How does each variant compare with SM+R?" in page
    assert "SM+S ends 1.9 % above SM+R in perplexity" in page
    with pytest.raises(ValueError, match=r"^baseline=SM is not among these runs; their variants are SM.G, SM.R, SM.S$"):
        build_report(runs, tmp_path / "out", baseline="SM")


def test_untrained_heads_are_named_and_their_distance_drawn(tmp_path: Path) -> None:
    trained, still = write_run(tmp_path, "SM+R"), write_run(tmp_path, "SM+G")
    text = (still.folder / "metrics.jsonl").read_text()
    text = re.sub(r'(: "entropy_nats", "value": ).*', r"\1[[2.5, 2.5]]}", text)
    still = rewritten(still, re.sub(r'(: "ceiling_nats", "value": ).*', r"\1[2.6]}", text))
    (drawing,) = figure_named("entropy_nats-heads", [still]).drawings
    assert "SM+G: as before training" in drawing
    assert "layer 0 head 1: 3.85" in drawing  # percent below 2.6 nats
    assert "below the ceiling" not in figure_named("entropy_nats-heads", [trained]).caption


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "SM+G", steps=40)
    code = (
        "import sys; from pathlib import Path; from normfree.store.runs import Run, find_runs\n"
        "from normfree import build_report\n"
        "build_report(find_runs([sys.argv[1] + '/runs']), Path(sys.argv[1]) / 'out')\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


HOUSE_STYLE = """\
figure.figsize: 2, 2
savefig.bbox: tight
savefig.transparent: True
svg.fonttype: path
text.usetex: True
lines.marker: o
"""


@pytest.mark.slow
def test_backends_and_style_files_change_no_byte(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "runs", "SM+G", steps=40)]
    (tmp_path / "matplotlibrc").write_text(HOUSE_STYLE)
    settings = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "MATPLOTLIBRC": f"{tmp_path}/matplotlibrc"}
    words = ("report", str(tmp_path / "runs"), f"output={tmp_path / 'there'}")
    subprocess.run([sys.executable, "-m", "normfree", *words], check=True, env=os.environ | settings)
    build_report(runs, tmp_path / "here")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_bad_input_is_refused_before_writing(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "runs", "SM+G"), write_run(tmp_path / "runs", "SM+R", train={"precision": "bf16"})]
    with pytest.raises(ValueError, match="mix=true"):
        build_report(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"output=.*runs holds quick, so it is no report"):
        build_report(runs[:1], tmp_path / "runs")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("<p>My site</p>")
    with pytest.raises(ValueError, match=r"holds index\.html, so it is no report"):
        build_report(runs[:1], tmp_path / "site")
    assert (tmp_path / "site" / "index.html").read_text() == "<p>My site</p>"
    (tmp_path / "begun" / "figures").mkdir(parents=True)
    unfinished = write_run(tmp_path, "SM+G", status="failed")
    assert "No run finished." in build_report([unfinished], tmp_path / "begun").read_text()
