"""Pruning methods: lists of stages, with the schedules of their masks."""

from .preparations import Select
from .stage import Method, RoleSettings, Rounds, Stage
from .table import METHODS, get_method, prune_and_tune, prune_only

__all__ = [
    "METHODS",
    "Method",
    "RoleSettings",
    "Rounds",
    "Select",
    "Stage",
    "get_method",
    "prune_and_tune",
    "prune_only",
]
