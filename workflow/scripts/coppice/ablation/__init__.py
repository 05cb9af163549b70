"""Ablations: arms that train one checkpoint at an equal budget, their stages and races, and the report that compares.

`arm` trains, `stages` and `racing` decide who goes on, `report` compares. Nothing is imported here: what decides and
reports needs no torch.
"""
