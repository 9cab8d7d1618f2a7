"""Training: `train(spec)` turns a RunSpec into a run folder."""

from normfree.training.train import InterruptedRunError, train

__all__ = ["InterruptedRunError", "train"]
