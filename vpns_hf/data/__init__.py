"""Load data sets for transfer, split them, transform images and draw batches."""

from .batches import RoleBatchSampler, RoleDataset, collate_images
from .columns import align_labels
from .corrupt import find_corrupt_images
from .images import CorruptImageError
from .loading import load_evaluation_split, load_transfer_dataset
from .splits import TransferSplits, find_duplicates
from .tasks import TRANSFER_TASKS, TransferTask
from .transforms import ImageTransforms, matching_image_processor

__all__ = [
    "TRANSFER_TASKS",
    "CorruptImageError",
    "ImageTransforms",
    "RoleBatchSampler",
    "RoleDataset",
    "TransferSplits",
    "TransferTask",
    "align_labels",
    "collate_images",
    "find_corrupt_images",
    "find_duplicates",
    "load_evaluation_split",
    "load_transfer_dataset",
    "matching_image_processor",
]
