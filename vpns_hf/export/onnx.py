"""Export a pruned model to ONNX."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..model.configuration import PromptedSparseConfig
from ..model.modeling import PromptedSparseModel
from ..values import count, optional, require
from .plain import require_equal, resolve_prompt, sample_images, warn_of_lost_prompt

# A protobuf message, and so an ONNX file, ends at 2 GiB; weights beyond that lie in a file of their own.
_LARGEST_ONNX = 2**31 - 2**24
# The first with all operators of convolutions and attention.
_FIRST_OPSET = 9


class _Logits(nn.Module):
    def __init__(self, model: PromptedSparseModel, use_prompt: bool):
        super().__init__()
        self.model, self.use_prompt = model, use_prompt

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values, use_prompt=self.use_prompt).logits


@torch.no_grad()
def export_onnx(
    model: PromptedSparseModel,
    path: str | os.PathLike[str],
    use_prompt: bool | None = None,
    opset: int | None = None,
) -> None:
    """Write the model as an ONNX file, with its label mapping and, where it is used, its prompt built in.

    The graph maps `pixel_values` [batch, channels, height, width], normalised, float32, of any batch size to `logits`
    [batch, num_labels]. The metadata of the file hold `id2label`, `image_size`, `image_mean`, `image_std` and
    `use_prompt` as JSON. The file is run under onnxruntime before it takes its place. Needs the packages of
    `pip install "vpns-hf[onnx]"`.

    Args:
        model: model in any state, of any dtype; not modified.
        path: path of the file, which is replaced if it exists. Weights of 2 GiB and more are written beside it, to
            `<path>.data`.
        use_prompt: whether the prompt is built in; None: `model.config.use_prompt`.
        opset: version of the ONNX operators; None: the default of torch.

    Raises:
        ImportError: the packages that ONNX needs are missing.
        ValueError: the file does not give the model's logits or has another opset than requested, or a prompt is
            requested and there is none.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f'ONNX needs more packages: `pip install "vpns-hf[onnx]"` ({error}).') from error
    path, use_prompt = Path(path), resolve_prompt(model, use_prompt)
    require("opset", opset, optional(count(_FIRST_OPSET, onnx.defs.onnx_opset_version())))
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file to export to, such as {path / 'model.onnx'}.")
    warn_of_lost_prompt(model, use_prompt)
    wrapped = copy.deepcopy(model).cpu().float().eval()
    wrapped.merge_and_unload()  # otherwise the file would hold the masks, too
    images = sample_images(wrapped.config, count=3)
    expected = wrapped(images, use_prompt=use_prompt).logits
    program = torch.onnx.export(
        _Logits(wrapped, use_prompt).eval(),
        # With a single image exporters take the batch size for a constant.
        (images[:2],),
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: "batch"}},
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # only the older exporter gives None
    _check_opset(program.model.opset_imports[""], opset)
    program.model.metadata_props.update(_onnx_metadata(wrapped.config, use_prompt))
    size = sum(tensor.nbytes for tensor in wrapped.state_dict().values())
    with _written_whole(path) as temporary:
        program.save(temporary, external_data=size >= _LARGEST_ONNX)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        for batch in (1, 3):
            (logits,) = session.run(["logits"], {"pixel_values": images[:batch].numpy()})
            require_equal(torch.from_numpy(logits), expected[:batch], "The ONNX file")


def _check_opset(written: int | None, requested: int | None) -> None:
    if requested not in (None, written):
        raise ValueError(
            f"The exporter of torch {torch.__version__} wrote ONNX opset {written} instead of opset {requested} for "
            f"this model; pass `opset={written}`, or leave it out."
        )


def _onnx_metadata(config: PromptedSparseConfig, use_prompt: bool) -> dict[str, str]:
    facts = {
        "id2label": config.id2label,
        "image_size": config.image_size,
        "image_mean": config.image_mean,
        "image_std": config.image_std,
        "use_prompt": use_prompt,
    }
    return {name: json.dumps(value) for name, value in facts.items()}


@contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path of the same name, whose files move to `path` when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".exporting-") as name:
        yield Path(name) / path.name
        # A separate file of weights comes first.
        for file in sorted(Path(name).iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.with_name(file.name))
