"""Text to packed token blocks, or images to rows of bytes: `prepare(DataSpec(...))` gives a `Corpus`."""

from normfree.data.corpus import Corpus, ImageCorpus, default_cache, prepare, prepared
from normfree.data.installed import held_out_text

__all__ = ["Corpus", "ImageCorpus", "default_cache", "held_out_text", "prepare", "prepared"]
