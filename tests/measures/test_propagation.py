"""Signal propagation against numpy's T x T matrices and singular values of the model's own hidden states."""

# T tokens, N all tokens, E hidden size

import numpy as np
import pytest
import torch

from normfree import measure
from tests.entropy.families import tiny_model
from tests.small_model import small_model

IDS = torch.arange(48).view(4, 12) % 20


def off_diagonal_mean(matrix: np.ndarray) -> float:
    return float(matrix[~np.eye(len(matrix), dtype=bool)].mean())


@pytest.mark.parametrize("family", ["normfree", "gpt2", "llama"])
@pytest.mark.parametrize("batch", [4, 3])
def test_values_are_those_of_the_written_out_matrices(family: str, batch: int) -> None:
    model = small_model() if family == "normfree" else tiny_model(family)
    measured = measure(model, IDS, "propagation", batch=batch)
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states[:-1]
    for layer, stream_BTE in enumerate(states.double().numpy() for states in hidden):
        stream_NE = stream_BTE.reshape(-1, stream_BTE.shape[-1])
        directions_BTE = stream_BTE / np.linalg.norm(stream_BTE, axis=-1, keepdims=True)
        cosines = [off_diagonal_mean(each_TE @ each_TE.T) for each_TE in directions_BTE]
        products = [off_diagonal_mean(stream_TE @ stream_TE.T) for stream_TE in stream_BTE]
        residuals = [np.linalg.norm(each - each.mean(0)) / np.linalg.norm(each) for each in stream_BTE]
        shares = np.linalg.svd(stream_NE, compute_uv=False)
        shares /= shares.sum()
        values = {name: values_L[layer] for name, values_L in measured.values.items()}
        assert values["token_cosine"] == pytest.approx(np.mean(cosines), abs=1e-6)
        square = np.square(stream_NE).sum(1).mean()
        assert values["token_correlation"] == pytest.approx(np.mean(products) / square, abs=1e-6)
        assert values["rank_collapse_residual"] == pytest.approx(np.mean(residuals), abs=1e-6)
        assert values["effective_rank"] == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-6)


def test_equal_tokens_have_collapsed() -> None:
    """Without positions and with one token repeated, all rows are one vector."""
    model = small_model(position="rotary")
    measured = measure(model, torch.full((2, 12), 7), "propagation")
    assert measured["token_cosine"] == pytest.approx([1] * 3, abs=1e-6)
    assert measured["token_correlation"] == pytest.approx([1] * 3, abs=1e-6)
    assert measured["rank_collapse_residual"] == pytest.approx([0] * 3, abs=1e-6)
    assert measured["effective_rank"] == pytest.approx([1] * 3, abs=1e-4)  # float32's rounding differs by token
