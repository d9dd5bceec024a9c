"""Describe the stages of a run as values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageSettings:
    """How one stage of the run trained.

    Args:
        name: of the stage.
        steps: its optimizer steps.
        roles: role -> (optimizer, learning rate).
    """

    name: str
    steps: int
    roles: dict[str, tuple[str, float]]

    def row(self) -> tuple[str, str, str]:
        """The stage as a row of a table: name, what trained and how, steps."""
        trained = ", ".join(f"{role}: {optim} at {rate:g}" for role, (optim, rate) in sorted(self.roles.items()))
        return self.name.replace("_", " "), trained or "nothing", f"{self.steps:,}"
