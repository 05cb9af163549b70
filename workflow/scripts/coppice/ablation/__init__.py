"""Ablations: train one checkpoint in several ways (arms) at an equal budget, and compare them in a report.

`arm` trains and evaluates an arm, `stages` and `races` decide which arms continue, `report` compares them. Nothing is
imported here, so that deciding and reporting do not load torch.
"""
