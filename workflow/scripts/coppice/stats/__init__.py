"""Statistics of paired comparisons, and the samples of evaluations that they are made of."""
