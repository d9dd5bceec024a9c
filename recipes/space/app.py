"""Compare a dense and a pruned image classifier in the browser: predictions, times, bytes, prompt and kept weights.

    python recipes/space/app.py                                # the subnetworks in model_cards/
    python recipes/space/app.py vpns-demo vpns-demo/dense      # folders of saved models of one backbone

A dense model among the folders is shown beside the pruned ones. Needs `pip install -e ".[space]"`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from side_by_side import (
    compare,
    kept_figure,
    open_image,
    preprocess,
    prompt_caption,
    prompt_picture,
    seen_picture,
    sparsity_label,
)
from subnetworks import Models, find_folders, load_models

from vpns_hf.cli import exit_in_one_sentence
from vpns_hf.data import CorruptImageError

HERE = Path(__file__).parent
EXAMPLES = sorted((HERE / "examples").glob("*.png"))
# A Space holds the model cards beside the app, a clone two folders up.
CARDS = HERE / "model_cards" if (HERE / "model_cards").is_dir() else HERE.parents[1] / "model_cards"
# The slider counts subnetworks; its label says the sparsity.
CSS = """
#sparsity .tab-like-container, #sparsity .min_value, #sparsity .max_value {display: none}
#examples, #examples .gallery-container, #examples .grid-wrap {height: auto; min-height: 0; max-height: none}
#examples .grid-container {grid-template-columns: repeat(5, minmax(0, 1fr)); grid-auto-rows: auto; padding-top: 0}
#examples .thumbnail-item {aspect-ratio: 1; height: auto}
.picture img {image-rendering: pixelated}
"""


def build(models: Models, examples: Sequence[Path]) -> gr.Blocks:
    """Build the interface.

    Args:
        models: models to compare.
        examples: image files to choose from; the first is shown at the start.
    """
    first = models.subnetworks[0]
    labels = ", ".join(first.model.config.id2label.values())

    def show(path: str, index: int, with_prompt: bool) -> dict[gr.components.Component, Any]:
        subnetwork = models.subnetworks[index]
        with_prompt = with_prompt and subnetwork.model.prompt is not None
        try:
            image = open_image(Path(path))
        except CorruptImageError as error:
            empty = dict.fromkeys((seen, *facts, *bars, remarks))
            return empty | {
                problem: gr.Markdown(
                    f"### This image cannot be read\n{error}. Choose another one, such as a PNG or JPEG.", visible=True
                )
            }
        result = compare(models, subnetwork, image, with_prompt)
        return {
            problem: gr.Markdown(visible=False),
            seen: seen_picture(subnetwork.model, preprocess(models, image), with_prompt),
            facts[0]: result.dense.facts(),
            facts[1]: result.pruned.facts(),
            bars[0]: result.dense.probabilities,
            bars[1]: result.pruned.probabilities,
            remarks: result.remarks,
        }

    def describe(index: int) -> dict[gr.components.Component, Any]:
        subnetwork = models.subnetworks[index]
        return {
            sparsity: gr.Slider(label=sparsity_label(models, subnetwork)),
            kept: kept_figure(subnetwork),
            prompt: prompt_picture(subnetwork.model),
            caption: prompt_caption(subnetwork.model),
            use_prompt: gr.Checkbox(interactive=subnetwork.model.prompt is not None),
        }

    with gr.Blocks(title="vpns_hf: dense and pruned, side by side", analytics_enabled=False) as blocks:
        gr.Markdown(
            "# Dense and pruned, side by side\n"
            "Classifiers pruned with [VPNs](https://arxiv.org/abs/2312.01397): masks, weights and a visual prompt, "
            f"learned together. They know {len(first.model.config.id2label)} classes and no others: {labels}."
        )
        chosen = gr.State(str(examples[0]))
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                upload = gr.UploadButton("Upload an image", file_types=["image"], elem_id="upload")
                problem = gr.Markdown(visible=False, elem_id="problem")
                gr.Markdown("or choose one of the test split")
                gallery = gr.Gallery(
                    [str(path) for path in examples],
                    show_label=False,
                    columns=5,
                    height="auto",
                    allow_preview=False,
                    object_fit="contain",
                    buttons=[],
                    elem_id="examples",
                    elem_classes="picture",
                )
                sparsity = gr.Slider(
                    0,
                    len(models.subnetworks) - 1,
                    value=0,
                    step=1,
                    visible=len(models.subnetworks) > 1,
                    buttons=[],
                    elem_id="sparsity",
                )
                use_prompt = gr.Checkbox(
                    label="Add the visual prompt",
                    info="A pattern that is added to the pixels; grey leaves them as they are.",
                    elem_id="use_prompt",
                )
                with gr.Row():
                    _, seen = _picture("What the model sees", "seen")
                    caption, prompt = _picture("", "prompt")
            with gr.Column(scale=3, min_width=300):
                facts, bars = [], []
                with gr.Row():
                    for side in ("dense", "pruned"):
                        with gr.Column(min_width=260):
                            facts.append(gr.Markdown(elem_id=f"{side}_facts"))
                            bars.append(gr.Label(num_top_classes=5, show_label=False, elem_id=f"{side}_bars"))
                remarks = gr.Markdown(elem_id="remarks")
                gr.Markdown("### Where the weights were kept")
                kept = gr.Plot(show_label=False, elem_id="kept")
        settings = [chosen, sparsity, use_prompt]
        results = [problem, seen, *facts, *bars, remarks]
        described = [sparsity, kept, prompt, caption, use_prompt]
        # One at a time: measurements must not slow each other down.
        alone: Any = {"concurrency_id": "measure", "concurrency_limit": 1, "api_visibility": "private"}
        blocks.load(describe, sparsity, described, **alone).then(show, settings, results, **alone)
        upload.upload(lambda path: path, upload, chosen, **alone).then(show, settings, results, **alone)
        gallery.select(_chosen_example, None, chosen, **alone).then(show, settings, results, **alone)
        sparsity.change(describe, sparsity, described, **alone).then(show, settings, results, **alone)
        use_prompt.change(show, settings, results, **alone)
    return blocks


def _picture(caption: str, name: str) -> tuple[gr.Markdown, gr.Image]:
    with gr.Column(min_width=130):
        return (
            gr.Markdown(caption, elem_id=f"{name}_caption"),
            gr.Image(show_label=False, buttons=[], elem_id=name, elem_classes="picture"),
        )


def _chosen_example(event: gr.SelectData) -> str:
    return str(EXAMPLES[event.index])


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the models and serve the interface until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="saved models of one backbone; those in model_cards/")
    parser.add_argument("--port", type=int, help="port of the server; the first free one from 7860 on")
    options = parser.parse_args(arguments)
    models = load_models(options.folders or find_folders(CARDS))
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none of another server
    build(models, EXAMPLES).launch(
        server_port=options.port, theme=theme, css=CSS, footer_links=["gradio"], max_file_size="20mb"
    )


if __name__ == "__main__":
    with exit_in_one_sentence(Path(__file__).name):
        main()
