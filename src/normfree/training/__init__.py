"""Training: `train(spec)` turns a RunSpec into a run folder."""

from normfree.training.signals import InterruptedRunError
from normfree.training.train import train
