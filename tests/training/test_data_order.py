from hypothesis import given
from hypothesis import strategies as st

from normfree.training.trainer import BlockOrder


@given(blocks=st.integers(1, 30), sequences=st.integers(1, 100), start=st.integers(0, 100), seed=st.integers(0, 9))
def test_a_resumed_order_is_the_rest_of_the_whole(blocks: int, sequences: int, start: int, seed: int) -> None:
    start = min(start, sequences)
    whole = list(BlockOrder(blocks=blocks, sequences=sequences, seed=seed))
    rest = list(BlockOrder(blocks=blocks, sequences=sequences, seed=seed, start=start))
    assert len(whole) == sequences == len(BlockOrder(blocks=blocks, sequences=sequences, seed=seed, start=start))
    assert rest == whole[start:]


@given(blocks=st.integers(1, 30), passes=st.integers(1, 4))
def test_each_pass_takes_every_block_once(blocks: int, passes: int) -> None:
    order = list(BlockOrder(blocks=blocks, sequences=blocks * passes, seed=0))
    for number in range(passes):
        assert sorted(order[number * blocks : (number + 1) * blocks]) == list(range(blocks))


def test_passes_and_seeds_differ() -> None:
    order = list(BlockOrder(blocks=50, sequences=100, seed=0))
    assert order[:50] != order[50:]
    assert order != list(BlockOrder(blocks=50, sequences=100, seed=1))
