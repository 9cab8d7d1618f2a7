"""What a run folder records, and what its numbers mean. No torch."""
