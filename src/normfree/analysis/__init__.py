"""What the numbers of runs mean: ceilings, ranges of entropy, verdicts, spread over seeds. No torch."""
