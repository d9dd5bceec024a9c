"""Report the kernels and times that were measured for inference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from .kernels import DENSE


@dataclass(frozen=True)
class LayerChoice:
    """Kernel of one layer.

    Args:
        name: of the layer in the backbone.
        shape: of its weight.
        density: fraction of its weights that are not zero.
        kernel: `"dense"`, or the fastest of those of [`KERNELS`].
        milliseconds: median time of each kernel that was measured; empty where none fits.
    """

    name: str
    shape: tuple[int, ...]
    density: float
    kernel: str
    milliseconds: Mapping[str, float]


@dataclass(frozen=True)
class InferenceReport:
    """Kernel of every prunable layer, and the time of the whole model with and without them.

    Args:
        layers: in the order in which they were called.
        milliseconds: median time of the whole model, `"dense"` as it was given and `"fast"`.
        kept_dense: why all layers are dense all the same, or None.
        example_shape: of the input that was measured.
        threads: of torch, with which it was measured.
    """

    layers: tuple[LayerChoice, ...]
    milliseconds: Mapping[str, float]
    kept_dense: str | None
    example_shape: tuple[int, ...]
    threads: int

    @property
    def speedup(self) -> float:
        """Time of the dense model over that of this one; 1 where all layers are dense."""
        return 1.0 if self.kept_dense else self.milliseconds[DENSE] / self.milliseconds["fast"]

    def to_markdown(self) -> str:
        """Format one row per layer, under a line about the whole model."""
        kernels = sorted({name for layer in self.layers for name in layer.milliseconds} - {DENSE})
        head = ["layer", "weight", "density", *(f"{name} ms" for name in (DENSE, *kernels)), "runs on"]
        rows = [head, ["---", "---", *["---:"] * (len(head) - 3), "---"]]
        for layer in self.layers:
            times = (layer.milliseconds.get(name) for name in (DENSE, *kernels))
            rows.append(
                [
                    layer.name,
                    " x ".join(map(str, layer.shape)),
                    f"{layer.density:.1%}",
                    *("" if time is None else f"{time:.3f}" for time in times),
                    layer.kernel,
                ]
            )
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return f"{self._about()}\n\n{table}"

    def _about(self) -> str:
        shape, threads = " x ".join(map(str, self.example_shape)), self.threads
        times = f"{self.milliseconds[DENSE]:.2f} ms dense, {self.milliseconds['fast']:.2f} ms with sparse kernels"
        verdict = (
            f"All layers are dense: {self.kept_dense}." if self.kept_dense else f"{self.speedup:.2f} times as fast."
        )
        return f"Input {shape}, {threads} thread{'s' * (threads > 1)}: {times}. {verdict}"

    def to_json(self) -> str:
        """All figures as a JSON object."""
        return json.dumps(asdict(self) | {"speedup": self.speedup}, indent=2)
