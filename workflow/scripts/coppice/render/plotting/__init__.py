"""Figures: how they look, and the marks that several of them share."""
