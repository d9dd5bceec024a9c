"""Name the classes of the task, and keep the configurations of the model and its backbone in agreement."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedConfig

from .configuration import PromptedSparseConfig
from .configuration_checks import check_labels


def label_names(num_labels: int | None, id2label: Mapping[int, str] | None) -> dict[int, str] | None:
    """Return the labels of the task by class id, or None where neither their number nor their names are given.

    Raises:
        ValueError: both are given and do not fit, or the class ids do not count from 0 without gaps.
    """
    check_labels(id2label, num_labels)
    if id2label is not None:
        return {int(index): name for index, name in id2label.items()}
    return None if num_labels is None else {index: f"LABEL_{index}" for index in range(num_labels)}


def set_labels(config: PreTrainedConfig, labels: Mapping[int, str]) -> None:
    """Write the labels into a configuration."""
    config.id2label, config.label2id = dict(labels), {name: index for index, name in labels.items()}
    # Most configurations count their labels; that of PVT has a field of its own.
    config.num_labels = len(labels)


def labels_of(config: PreTrainedConfig) -> dict[int, str]:
    """Return the labels of a configuration by class id, numbered where it counts more than it names."""
    names = config.id2label or {}
    return dict(names) if len(names) == config.num_labels else {i: f"LABEL_{i}" for i in range(config.num_labels)}


def head_has_task_classes(config: PromptedSparseConfig) -> bool:
    """Return whether the head has the classes of the task, and not the source classes of a label mapping."""
    is_sliced = config.label_mapping_state == "final" and not config.keep_source_head
    return config.label_mapping is None or (is_sliced and config.label_mapping != "bayesian")


def share_labels(config: PromptedSparseConfig, backbone_config: PreTrainedConfig) -> None:
    """Write the labels of a model into the configuration of its backbone, where the head has the same classes.

    Raises:
        ValueError: the model counts other labels than its head has classes.
    """
    if not head_has_task_classes(config) or labels_of(backbone_config) == labels_of(config):
        return
    if backbone_config.num_labels != config.num_labels:
        raise ValueError(
            f"The configuration counts {config.num_labels} labels, but the head has {backbone_config.num_labels} "
            "classes; for another task pass `merge_and_unload()` of the model to "
            f"`PromptedSparseModel.from_backbone(..., num_labels={config.num_labels})`."
        )
    set_labels(backbone_config, config.id2label)
