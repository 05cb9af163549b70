"""Figures: their style, and the elements that several of them share."""
