"""Models that others made: loading, GGUF files, conversion to our classes."""
