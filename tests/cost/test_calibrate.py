"""The simulator is not installed here: what a user without it meets, and the real thing where it is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from normfree.cost.calibrate import calibrate, calibration_table


@pytest.mark.parametrize("python", [sys.executable, "/no/such/python"])
def test_a_python_without_the_simulator_is_told_how_to_get_it(python: str) -> None:
    with pytest.raises(ValueError, match=r"pip install 'spu==0\.9\.5'"):
        calibrate(Path(python))


def test_unknown_operation_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown operation 'softmaxx'; did you mean softmax"):
        calibrate(Path(sys.executable), operations=["softmaxx"])


@pytest.mark.slow
@pytest.mark.skipif("NORMFREE_SPU_PYTHON" not in os.environ, reason="NORMFREE_SPU_PYTHON names no Python with SPU")
def test_semi2k_prices_are_what_the_simulator_sends() -> None:
    found = calibrate(Path(os.environ["NORMFREE_SPU_PYTHON"]), protocol="semi2k")
    for one in found:
        assert one.bytes_per_element == pytest.approx(one.recorded_bytes_per_element, rel=1e-3)
    assert len(calibration_table(found, protocol="semi2k").rows) == len(found)
