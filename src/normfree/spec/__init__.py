"""What a run is: its options, their composition from YAML and words, and studies."""
