"""Figures: pure functions that draw arrays and runs into matplotlib Axes. Nothing here writes a file."""
