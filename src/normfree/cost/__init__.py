"""What a model costs in private inference: counts from a config, prices from measured constants. No torch needed."""

from normfree.cost.totals import of_config

__all__ = ["of_config"]
