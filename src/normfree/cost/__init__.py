"""What a model costs in private inference: counts from a config, prices from measured constants. No torch needed."""

from normfree.cost.constants import find_protocol
from normfree.cost.families import NoPriceError
from normfree.cost.totals import of_config, of_run
from normfree.cost.tradeoff import pareto_front, trade_off, trade_off_table

__all__ = [
    "NoPriceError",
    "find_protocol",
    "of_config",
    "of_run",
    "pareto_front",
    "trade_off",
    "trade_off_table",
]
