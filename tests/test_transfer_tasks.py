"""The table of transfer tasks: what its rows say of training, and every row from loading to a training step."""

import pytest
import yaml

from vpns_hf import VPNsTrainingArguments
from vpns_hf.recipe import DataArguments, parse_recipe
from vpns_hf.transfer_tasks import TRANSFER_TASKS

PAPER = ("cifar10", "cifar100", "tiny_imagenet", "dtd", "flowers102", "stanford_cars", "oxford_pets", "food101")


def test_the_rows_of_the_table():
    assert set(TRANSFER_TASKS) == {*PAPER, "imagenet_1k", "sun397", "svhn", "eurosat", "gtsrb", "ucf101"}
    assert {name for name, task in TRANSFER_TASKS.items() if task.paper} == {*PAPER, "imagenet_1k"}
    for key in ("food101", "tiny_imagenet", "imagenet_1k"):
        assert TRANSFER_TASKS[key].test in ("validation", "valid")
        assert TRANSFER_TASKS[key].validation is None
    by_class = {name for name, task in TRANSFER_TASKS.items() if "mean_per_class_accuracy" in task.metrics}
    assert by_class == {"flowers102", "oxford_pets"}
    assert all(task.metrics[0] == "accuracy" and task.licence for task in TRANSFER_TASKS.values())


class TestSettings:
    """Batch size and learning rates of a row, where neither YAML nor flag gives them."""

    def parse(self, tmp_path, *flags: str, **content) -> VPNsTrainingArguments:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"output_dir": str(tmp_path), "use_cpu": True} | content))
        _, args = parse_recipe((DataArguments, VPNsTrainingArguments), ["--config", str(path), *flags])
        return args

    def rates(self, args: VPNsTrainingArguments) -> tuple:
        search = (args.score_optim, args.score_learning_rate, args.search_prompt_learning_rate)
        return (*search, str(args.optim).split(".")[-1].lower(), args.learning_rate, args.prompt_learning_rate)

    # From the authors' launch scripts and data loaders.
    @pytest.mark.parametrize(
        ("name", "batch_size", "search", "tune"),
        [
            *((name, 256, ("adam", 1e-4), ("sgd", 1e-2)) for name in ("cifar10", "cifar100", "food101")),
            ("tiny_imagenet", 256, ("adam", 1e-4), ("sgd", 1e-2)),
            ("dtd", 64, ("adam", 1e-4), ("sgd", 1e-2)),
            ("flowers102", 128, ("adam", 1e-3), ("adam", 1e-3)),
            ("stanford_cars", 128, ("adam", 1e-3), ("adam", 1e-3)),
            ("oxford_pets", 64, ("sgd", 5e-2), ("sgd", 1e-2)),
            ("imagenet_1k", 1024, ("adam", 1e-4), ("sgd", 1e-2)),
        ],
    )  # fmt: skip
    def test_of_the_paper(self, tmp_path, name, batch_size, search, tune):
        args = self.parse(tmp_path, "--dataset_name", name)
        assert args.per_device_train_batch_size == batch_size
        assert self.rates(args) == (*search, search[1], *tune, tune[1])

    def test_yaml_and_flags_win(self, tmp_path):
        args = self.parse(
            tmp_path, "--learning_rate", "0.5", dataset_name="flowers102", score_learning_rate=3e-3, optim="adam"
        )
        assert self.rates(args) == ("adam", 3e-3, 1e-3, "adam", 0.5, 1e-3)
        assert args.per_device_train_batch_size == 128
        args = self.parse(tmp_path, "--per-device-train-batch-size", "7", dataset_name="flowers102")
        assert args.per_device_train_batch_size == 7

    def test_learning_rates_go_with_their_optimizer(self, tmp_path):
        args = self.parse(tmp_path, "--optim", "sgd", dataset_name="flowers102")
        assert self.rates(args) == ("adam", 1e-3, 1e-3, "sgd", 1e-2, 1e-2)

    def test_the_batch_size_is_that_of_a_step(self, tmp_path):
        args = self.parse(tmp_path, dataset_name="dtd", gradient_accumulation_steps=4)
        assert args.per_device_train_batch_size == 16
        with pytest.raises(ValueError, match="dtd is 64, which 3 batches a step"):
            self.parse(tmp_path, dataset_name="dtd", gradient_accumulation_steps=3)

    @pytest.mark.parametrize("name", ["sun397", "./dtd", "user/dtd"])
    def test_other_data_sets_change_nothing(self, tmp_path, name):
        args = self.parse(tmp_path, dataset_name=name)
        assert self.rates(args) == ("adam", 1e-4, 1e-4, "sgd", 1e-2, 1e-2)
        assert args.per_device_train_batch_size == VPNsTrainingArguments(str(tmp_path)).per_device_train_batch_size
