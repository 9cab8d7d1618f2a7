"""What a model can do: right and wrong Python texts in pairs, and HumanEval's solutions, scored as whole texts."""
