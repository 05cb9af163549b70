"""Statistics of paired comparisons, and the stored samples of evaluations that they use."""
