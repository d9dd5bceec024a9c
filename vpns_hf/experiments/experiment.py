"""Build data, model and trainer from the arguments of an experiment."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from transformers import BaseImageProcessor, set_seed

from ..data.loading import load_transfer_dataset
from ..data.splits import SplitView, TransferSplits, find_duplicates, shared_between_splits
from ..data.transforms import ImageTransforms, matching_image_processor
from ..masking.patterns import get_pattern
from ..methods.table import get_method
from ..model.backbones import find_image_processor
from ..model.modeling import PromptedSparseModel
from ..training.arguments import VPNsTrainingArguments
from ..training.checks import check_pattern
from ..training.trainer import VPNsTrainer
from .arguments import DataArguments, ModelArguments

logger = logging.getLogger(__name__)


def _report_duplicates(splits: TransferSplits, num_proc: int | None) -> None:
    duplicates = find_duplicates(splits, num_proc)
    shared = shared_between_splits(duplicates)
    examples = "; ".join(", ".join(f"{copy.place} ({copy.split})" for copy in copies) for copies in shared[:5])
    logger.warning(
        "%d images are stored more than once, %d of them in more than one of train, validation and test%s",
        len(duplicates),
        len(shared),
        f": {examples}" if examples else ".",
    )


def check_cells(pattern: str, methods: Iterable[str], sparsities: Iterable[float]) -> None:
    """Raise unless every method and sparsity works with a pattern.

    Raises:
        ValueError: one does not.
    """
    for method in methods:
        check_pattern(method, get_method(method), get_pattern(pattern))
    for sparsity in sparsities:
        get_pattern(pattern).final_sparsity(sparsity)


class Experiment:
    """Backbone, data and image transforms that the runs of an experiment share.

    Args:
        model_args, data_args: arguments of backbone and data.
        args: arguments of training; those of a run are passed to [`~Experiment.trainer`].

    Raises:
        ValueError: the data do not fit the arguments.
        OSError: the data cannot be read.
    """

    def __init__(self, model_args: ModelArguments, data_args: DataArguments, args: VPNsTrainingArguments):
        self.model_args, self.data_args, self.args = model_args, data_args, args
        self.hub: dict[str, Any] = {
            "revision": model_args.model_revision,
            "token": model_args.token,
            "cache_dir": model_args.cache_dir,
        }
        # One process downloads and prepares; the others find it done.
        with args.main_process_first(desc="loading the data"):
            self.splits = self._load_splits()

    def _load_splits(self) -> TransferSplits:
        data = self.data_args
        splits = load_transfer_dataset(
            data.dataset_name,
            name=data.dataset_config_name,
            image_column=data.image_column_name,
            label_column=data.label_column_name,
            train_split=data.train_split,
            validation_split=data.validation_split,
            test_split=data.test_split,
            validation_fraction=data.validation_fraction,
            shots=data.shots,
            fraction=data.fraction,
            seed=data.split_seed,
            corrupt_images=data.corrupt_images,
            stream_images=data.stream_images,
            revision=data.dataset_revision,
            cache_dir=self.model_args.cache_dir,
            token=self.model_args.token,
            num_proc=data.preprocessing_num_workers,
        )
        if data.check_duplicates:
            _report_duplicates(splits, data.preprocessing_num_workers)
        return splits

    def trainer(
        self, args: VPNsTrainingArguments, prepare: Callable[[PromptedSparseModel], None] | None = None
    ) -> VPNsTrainer:
        """Wrap the pretrained backbone and build its trainer; prompted batches are augmented only on request.

        Args:
            args: arguments of the run.
            prepare: function that changes the model before the trainer is built, such as loading a subnetwork.

        Raises:
            ValueError: backbone, data and method do not fit each other.
        """
        set_seed(args.seed)
        processor = find_image_processor(self.model_args.model_name_or_path, self.hub)
        model = self._build_model(processor, args)
        if prepare is not None:
            prepare(model)
        processor = matching_image_processor(processor, *model.config.geometry)
        self.transforms = ImageTransforms(processor, *model.config.geometry, self.data_args.augmentation)
        with args.main_process_first(desc="resizing images"):
            augmented, plain = self._train_view(), self.eval_split("train")
            validation = self.eval_split("validation")
        return VPNsTrainer(
            model=model,
            args=args,
            train_dataset=augmented,
            prompted_train_dataset=augmented if self.data_args.augment_prompted else plain,
            eval_dataset=validation,
            processing_class=processor,
        )

    def _train_view(self) -> SplitView:
        if self.data_args.cache_images:
            split, rows = self.splits["train"], self.splits.rows["train"]
            return self.transforms.cached_train_view(split, rows, self.data_args.preprocessing_num_workers)
        return self.splits.view("train", self.transforms.train)

    def eval_split(self, name: str) -> SplitView:
        """Return a split with the transforms of evaluation; only after [`~Experiment.trainer`], which sets these."""
        # The test split is read once, so copies of it would cost more than they save.
        if self.data_args.cache_images and name != "test":
            split, rows = self.splits[name], self.splits.rows[name]
            return self.transforms.cached_eval_view(split, rows, self.data_args.preprocessing_num_workers)
        return self.splits.view(name, self.transforms.eval)

    def _build_model(self, processor: BaseImageProcessor | None, args: VPNsTrainingArguments) -> PromptedSparseModel:
        wanted = self.model_args
        head: dict[str, Any] = {
            "label_mapping": wanted.label_mapping,
            "keep_source_head": wanted.keep_source_head,
            "new_head": wanted.new_head,
        }
        if needed := get_method(args.method).backbone:
            # A method's own needs override the recipe's choice of head.
            head = {"new_head": None, **needed}
        return PromptedSparseModel.from_backbone(
            wanted.model_name_or_path,
            sparsity=args.sparsity,
            scope=wanted.scope,
            pattern=wanted.pattern,
            budget=wanted.budget,
            channel_multiple=wanted.channel_multiple,
            prompt=wanted.prompt,
            prompt_size=wanted.prompt_size,
            prompt_inner_size=wanted.prompt_inner_size,
            id2label=dict(enumerate(self.splits["train"].features["label"].names)),
            ignore_modules=wanted.ignore_modules,
            image_size=wanted.image_size,
            image_processor=processor,
            **head,
            **self.hub,
        )
