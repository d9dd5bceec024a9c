"""Experiments: parse YAML and flags, train cells, and report them as tables and figures."""

from .arguments import DataArguments, DryRunArguments, ModelArguments
from .experiment import Experiment
from .parsing import parse_recipe

__all__ = ["DataArguments", "DryRunArguments", "Experiment", "ModelArguments", "parse_recipe"]
