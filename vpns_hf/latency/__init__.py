"""Latency of a pruned model in every runtime: measured in processes that take turns, and kept as a report."""

from .measured import Latency, LatencyReport, Machine

__all__ = ["Latency", "LatencyReport", "Machine"]
