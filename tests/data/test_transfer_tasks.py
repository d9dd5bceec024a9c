"""The table of transfer tasks: what its rows say of training, and every row from loading to a training step."""

import io
from dataclasses import dataclass, field, replace

import datasets
import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from helpers.models import tiny_backbone
from helpers.pictures import picture
from PIL import Image
from transformers import ViTImageProcessor

from vpns_hf import VPNsTrainingArguments
from vpns_hf.data import TRANSFER_TASKS
from vpns_hf.experiments import DataArguments, Experiment, ModelArguments, parse_recipe

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
        path.write_text(yaml.safe_dump({"output_dir": str(tmp_path), "use_cpu": True, "method": "vpns"} | content))
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

    def test_a_method_that_finds_its_score_rate_keeps_it(self, tmp_path):
        args = self.parse(tmp_path, dataset_name="oxford_pets", method="vpns_joint")
        assert self.rates(args) == ("adam", None, 1e-4, "sgd", 1e-2, 1e-2)
        assert args.role_settings("scores", args.pruning_method.stages[-1]).learning_rate == "auto"
        assert args.per_device_train_batch_size == 64

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
        assert self.rates(args) == ("adam", None, 1e-4, "sgd", 1e-2, 1e-2)
        assert args.per_device_train_batch_size == VPNsTrainingArguments(str(tmp_path)).per_device_train_batch_size


@dataclass
class Schema:
    """What a data set of the Hub holds besides what its row names: a tiny one of the same shape is made from it."""

    splits: dict[str, int]
    extra: dict = field(default_factory=dict)
    kinds: tuple[str, ...] = ("JPEG RGB",)
    unlabelled: tuple[str, ...] = ()
    expected: dict[str, int] = field(default_factory=dict)


CORRUPTIONS = dict.fromkeys(
    ("contrast", "gaussian_noise", "impulse_noise", "jpeg_compression", "motion_blur", "pixelate", "spatter"), 3
)
CARVED = {"train": 36, "validation": 4, "test": 6}
SCHEMAS = {
    "cifar10": Schema({"train": 40, "test": 6}, kinds=("PNG RGB",), expected=CARVED),
    "cifar100": Schema(
        {"train": 40, "test": 6}, {"coarse_label": ClassLabel(20)}, kinds=("PNG RGB",), expected=CARVED
    ),
    "tiny_imagenet": Schema({"train": 40, "valid": 6}, kinds=("JPEG RGB", "JPEG L"), expected=CARVED),
    "dtd": Schema({"train": 40, "test": 6}, expected=CARVED),
    "flowers102": Schema(
        {"train": 40, "validation": 10, "test": 6}, expected={"train": 40, "validation": 10, "test": 6}
    ),
    "stanford_cars": Schema({"train": 40, "test": 6} | CORRUPTIONS, kinds=("JPEG RGB", "JPEG L"), expected=CARVED),
    "oxford_pets": Schema(
        {"train": 40, "test": 6},
        {"image_id": Value("string"), "label_cat_dog": ClassLabel(names=["cat", "dog"])},
        kinds=("JPEG RGB", "PNG RGBA", "GIF P", "JPEG CMYK"),
        expected=CARVED,
    ),
    "food101": Schema({"train": 40, "validation": 6}, expected=CARVED),
    "imagenet_1k": Schema(
        {"train": 40, "validation": 6, "test": 5},
        kinds=("JPEG RGB", "JPEG L", "JPEG CMYK", "PNG RGB", "JPEG EXIF"),
        unlabelled=("test",),
        expected=CARVED,
    ),
    "sun397": Schema({"train": 40, "test": 6}, kinds=("JPEG RGB", "JPEG L"), expected=CARVED),
    "svhn": Schema({"train": 40, "test": 6, "extra": 9}, kinds=("PNG RGB",), expected=CARVED),
    "eurosat": Schema(
        {"train": 40, "validation": 10, "test": 6},
        {"image_id": Value("string")},
        expected={"train": 40, "validation": 10, "test": 6},
    ),
    "gtsrb": Schema({"train": 40, "test": 6} | CORRUPTIONS, kinds=("PNG RGB",), expected=CARVED),
    "ucf101": Schema(
        {"train": 120, "test": 18},
        {"video_id": Value("string"), "clip_id": Value("string"), "frame": Value("int64")},
        expected=CARVED,  # three frames a clip
    ),
}


def image_file(index: int, kind: str) -> dict:
    encoding, mode = kind.split()
    options, image = {}, picture(index, size=(20 + index % 7, 24))
    if mode == "EXIF":
        exif = Image.Exif()
        exif[274] = 6
        options["exif"] = exif
    else:
        image = image.convert(mode)
    content = io.BytesIO()
    image.save(content, encoding, **options)
    return {"bytes": content.getvalue(), "path": None if encoding == "PNG" else f"{index}.{encoding.lower()}"}


def column(name: str, feature, index: int):
    """A value of a column that the row does not use."""
    values = {"video_id": f"v_{index // 9}", "clip_id": f"c{index // 3 % 3}", "frame": (index + 1) % 3}
    return values.get(name, index % 2 if isinstance(feature, ClassLabel) else f"{name} {index}")


def write_data_set(folder, key: str) -> None:
    """A repository of parquet files with the columns, splits and configuration of a data set of the Hub."""
    task, schema = TRANSFER_TASKS[key], SCHEMAS[key]
    labels = ClassLabel(names=[f"class {index}" for index in range(task.num_classes)])
    features = Features({task.image: datasets.Image(), task.label: labels, **schema.extra})
    frames = 3 if task.clip else 1
    files = []
    for split, count in schema.splits.items():
        rows = {
            task.image: [image_file(i, schema.kinds[i % len(schema.kinds)]) for i in range(count)],
            # The last class is there, so that a head of the wrong size would be found out.
            task.label: [
                -1 if split in schema.unlabelled else (0, task.num_classes - 1)[i // frames % 2] for i in range(count)
            ],
        } | {name: [column(name, feature, i) for i in range(count)] for name, feature in schema.extra.items()}
        (folder / "data").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"data/{split}-00000-of-00001.parquet")
        files.append({"split": split, "path": f"data/{split}-*"})
    card = yaml.safe_dump({"configs": [{"config_name": task.name or "default", "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}---\n")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    tiny_backbone("vit").save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def experiment(backbone, folder, data_args: DataArguments, **settings) -> tuple[Experiment, VPNsTrainingArguments]:
    args = VPNsTrainingArguments(
        str(folder / "out"), use_cpu=True, max_steps=1, per_device_train_batch_size=8, report_to="none",
        disable_tqdm=True, save_strategy="no", sparsity=0.5, dataloader_pin_memory=False, method="vpns", **settings,
    )  # fmt: skip
    model_args = ModelArguments(str(backbone), prompt_size=4, cache_dir=str(folder / "cache"))
    return Experiment(model_args, data_args, args), args


@pytest.mark.parametrize("key", sorted(TRANSFER_TASKS))
def test_a_row_from_loading_to_a_training_step(key, backbone, tmp_path, monkeypatch, capsys):
    write_data_set(tmp_path / "data", key)
    task = TRANSFER_TASKS[key]
    monkeypatch.setitem(TRANSFER_TASKS, key, replace(task, path=str(tmp_path / "data")))
    run, args = experiment(backbone, tmp_path, DataArguments(key))
    assert {name: len(split) for name, split in run.splits.items()} == SCHEMAS[key].expected
    assert run.splits["test"].features["label"].num_classes == task.num_classes
    assert all(image.mode == "RGB" for split in run.splits.values() for image in split["image"])
    if task.clip:
        stored = datasets.load_dataset(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
        assert {stored["train"][int(row)]["frame"] for row in run.splits.rows["train"].rows} == {1}
    trainer = run.trainer(args)
    before = {name: score.clone() for name, score in trainer.model.scores().items()}
    trainer.train()
    assert [stage.name for stage in trainer.finished_stages] == ["warm_up", "search", "tune"]
    assert trainer.model.config.num_labels == task.num_classes
    assert trainer.model.config.id2label[task.num_classes - 1] == f"class {task.num_classes - 1}"
    searched = trainer.load_stage("search").scores()
    assert any(not torch.equal(before[name], score) for name, score in searched.items())
    metrics = trainer.evaluate(run.eval_split("test"), metric_key_prefix="test")
    assert np.isfinite(metrics["test_loss"])


def test_a_data_set_of_ones_own(backbone, tmp_path):
    """String labels, grey images among coloured ones, no validation and no test split, a name for neither column."""
    files = [image_file(i, ("JPEG RGB", "JPEG L", "PNG P")[i % 3]) for i in range(40)]
    rows = {"picture": files, "kind": [("water lily", "ant")[i % 2] for i in range(40)]}
    features = Features({"picture": datasets.Image(), "kind": Value("string")})
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data/train.parquet")
    data_args = DataArguments(str(tmp_path / "data"), label_column_name="kind", shots=6, check_duplicates=True)
    run, args = experiment(backbone, tmp_path, data_args)
    assert {name: len(split) for name, split in run.splits.items()} == {"train": 12, "validation": 4, "test": 4}
    trainer = run.trainer(args)
    trainer.train()
    assert trainer.model.config.id2label == {0: "ant", 1: "water lily"}


def test_resized_copies_train_as_the_images_do(backbone, tmp_path):
    """The same losses, and the same test metrics, from the copies; what the recipe's other settings do is kept."""
    write_data_set(tmp_path / "data", "dtd")
    found = {}
    for cached in (False, True):
        data_args = DataArguments(
            str(tmp_path / "data"), cache_images=cached, augmentation="trivialaugment", fraction=0.5
        )
        run, args = experiment(backbone, tmp_path / str(cached), data_args)
        trainer = run.trainer(args)
        trainer.train()
        found[cached] = (len(run.splits["train"]), trainer.evaluate(run.eval_split("test"))["eval_loss"])
    assert found[True] == found[False]
    assert found[True][0] == 18


def test_duplicates_are_reported_on_request(backbone, tmp_path, caplog):
    files = [image_file(0, "PNG RGB"), *(image_file(i, "PNG RGB") for i in range(39))]
    features = Features({"image": datasets.Image(), "label": ClassLabel(2)})
    raw = Dataset.from_dict({"image": files, "label": [i % 2 for i in range(40)]}, features=features)
    datasets.DatasetDict(train=raw, test=raw.select([0])).save_to_disk(tmp_path / "data")
    experiment(backbone, tmp_path, DataArguments(str(tmp_path / "data"), check_duplicates=True))
    assert "1 images are stored more than once, 1 of them in more than one of" in caplog.text
    assert "train[0] (train), train[1] (validation), test[0] (test)" in caplog.text
