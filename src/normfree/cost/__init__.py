"""What a model costs in private inference: counts from a config, prices from measured constants. No torch needed."""

from normfree.cost.constants import find_protocol
from normfree.cost.totals import of_config, of_run
from normfree.cost.tradeoff import trade_off

__all__ = ["find_protocol", "of_config", "of_run", "trade_off"]
