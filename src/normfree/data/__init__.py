"""Text to packed token blocks: `prepare(DataSpec(...))` gives a `Corpus`. Knows nothing of models."""

from normfree.data.corpus import Corpus, default_cache, prepare, prepared
from normfree.data.installed import held_out_text

__all__ = ["Corpus", "default_cache", "held_out_text", "prepare", "prepared"]
