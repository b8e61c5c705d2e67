"""What a model's dimensions are made of, learnt from one run: expressions of axes, and a rule for each operation."""
