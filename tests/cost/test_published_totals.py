"""Totals against what others measured, and the document against the code."""

from pathlib import Path

import pytest

from benchmarks.private_inference.published import FITTED, ROWS, Row, config_of, fit_matmul, paper_config, paper_table
from normfree.cost.constants import load_constants
from normfree.cost.totals import of_config
from normfree.report.tables.table import to_markdown

DOCUMENT = Path(__file__).parents[2] / "docs" / "private-inference.md"
UNSEEN = [row for row in ROWS if row not in FITTED]


@pytest.mark.parametrize("row", UNSEEN, ids=lambda row: f"{row.label}-{row.layers}L-T{row.context}")
def test_published_gigabytes_outside_the_fit_are_predicted(row: Row) -> None:
    predicted = of_config(config_of(row), context=row.context).bytes / 1e9
    assert predicted == pytest.approx(row.gigabytes, rel=0.10 if row.context == 512 else 0.015)


def test_prices_of_matrix_products_are_the_fit() -> None:
    per_entry, per_element = fit_matmul()
    prices = load_constants()["protocols"]["cheetah"]["operations"]
    assert prices["embedding"]["bytes_per_right_element"] == pytest.approx(per_entry, rel=1e-4)
    assert prices["attention_product"]["bytes_per_right_element"] == pytest.approx(per_element, rel=1e-4)


def test_gelu_minus_relu_agrees_with_the_published_difference() -> None:
    """Independent of the fit: 25.32 - 9.44 GB over 4,718,592 activations."""
    tanh, relu = (of_config(config_of(row), context=128).bytes for row in ROWS[:2])
    assert tanh - relu == pytest.approx(25.32e9 - 9.44e9, rel=0.003)


def test_unpublished_norm_free_totals_of_gpt2() -> None:
    """The hand-made estimates of the reference: about 23.3 and 7.4 to 7.5 GB at T = 128."""
    sm_g, sm_r = (of_config(paper_config("GPT-2 125M", label, 128)).bytes / 1e9 for label in ("SM+G", "SM+R"))
    assert sm_g == pytest.approx(23.3, rel=0.01)
    assert sm_r == pytest.approx(7.45, rel=0.01)


def test_document_shows_the_table_of_the_code() -> None:
    assert to_markdown(paper_table()) in DOCUMENT.read_text()
