"""Tasks of lm-evaluation-harness on a model, what they cost, and whether two results differ."""
