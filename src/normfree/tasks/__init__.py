"""What a model can do: right and wrong Python texts in pairs, and HumanEval's solutions, scored as whole texts.

Every pair has a mirror that swaps the same two pieces the other way round, so token frequencies alone are at chance.
"""
