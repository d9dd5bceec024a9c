"""Experiments: from arguments in YAML and flags to trained cells, tables and figures."""

from .arguments import DataArguments, DryRunArguments, ModelArguments, parse_recipe
from .experiment import Experiment

__all__ = ["DataArguments", "DryRunArguments", "Experiment", "ModelArguments", "parse_recipe"]
