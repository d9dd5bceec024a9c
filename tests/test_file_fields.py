"""The table of every field of every file that is read back: how it is checked, and by which test that is shown.

A field that is added to a file without a row here fails.
"""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from helpers.models import tiny_model
from safetensors import safe_open

from vpns_hf import PromptedSparseConfig, VPNsTrainingArguments
from vpns_hf.experiments.arguments import DataArguments, ModelArguments, PruneArguments
from vpns_hf.experiments.compare import ComparisonArguments
from vpns_hf.experiments.transfer_arguments import SourceArguments, TransferArguments
from vpns_hf.report.model_card import SubnetworkCard
from vpns_hf.training.argument_checks import CHECKS
from vpns_hf.training.counters import Cost
from vpns_hf.training.run_record import STAGES_NAME, FinishedStage, RunRecord

TESTS = Path(__file__).parent
FIELDS_OF_ITS_OWN = "configuration_checks.FIELDS", "test_wrong_fields_are_refused"
LABELS = "configuration_checks.check_labels", "test_wrong_labels_and_dtypes_are_refused"
CONFIG = {
    **dict.fromkeys(set(PromptedSparseConfig.__annotations__) - {"backbone_config"}, FIELDS_OF_ITS_OWN),
    "backbone_config": ("backbone_config.check_backbone", "test_wrong_backbones_are_refused"),
    "id2label": LABELS,
    "label2id": (
        "transformers derives it from `id2label`",
        "test_both_configurations_have_the_labels_that_were_renamed",
    ),
    "dtype": ("PromptedSparseConfig.__post_init__", "test_wrong_labels_and_dtypes_are_refused"),
    "model_type": ("transformers looks it up", "test_a_wrapper_in_a_wrapper_is_refused_at_once"),
    "architectures": ("not read", "test_what_is_built_comes_back_from_a_file"),
    "transformers_version": ("not read", "test_what_is_built_comes_back_from_a_file"),
}
RECORD = "run_record.RunRecord.load", "test_damaged_records_are_refused_in_one_sentence"
STAGES = {
    "settings": ("run_settings.check_settings", "test_a_run_is_not_resumed_under_other_settings"),
    "finished": RECORD,
    **{f"finished.{field.name}": RECORD for field in dataclasses.fields(FinishedStage)},
    **{f"finished.cost.{field.name}": RECORD for field in dataclasses.fields(Cost)},
}
LAYOUT = "storage.header.read_layout", "test_mutated_folders_are_refused_or_the_same"
HEADER = {
    "format": ("safetensors and transformers look it up", "test_mutated_folders_are_refused_or_the_same"),
    "vpns_hf_packing": ("storage.header.read_header", "test_mutated_folders_are_refused_or_the_same"),
    "vpns_hf_layout": LAYOUT,
    "vpns_hf_layout.metadata": LAYOUT,
    "vpns_hf_layout.packed": LAYOUT,
    "vpns_hf_layout.checksums": LAYOUT,
}
# Written for people and for rendering the card again; no command reads it back.
CARD = {
    *("title", "repo_id", "base_model", "base_model_is_on_hub", "dataset", "dataset_id", "split", "images", "method"),
    *("results", "sparsity", "stages", "settings", "uses_prompt", "has_prompt", "figures", "license", "version"),
    *("dataset_license", "dataset_source"),
    "latency",
}
# Keys of recipe.yaml and flags: each is checked by its type or by a row of a table.
ARGUMENTS = (
    (ModelArguments, {"model_name_or_path": "x"}),
    (DataArguments, {"dataset_name": "x"}),
    (SourceArguments, {}),
    (VPNsTrainingArguments, {"output_dir": "x", "use_cpu": True}),
    (PruneArguments, {}),
    (ComparisonArguments, {}),
    (TransferArguments, {"targets": ["x"]}),
)
# transformers takes objects of several classes there and checks them itself.
LEFT_TO_TRANSFORMERS = {name for name, check in CHECKS.items() if check.accepts(object())}


@pytest.fixture
def frozen():
    model = tiny_model("vit", label_mapping="frequency", num_labels=3)
    model.set_label_mapping([4, 0, 2])
    model.freeze_masks()
    return model


def test_every_field_of_the_configuration_has_a_row(frozen, tmp_path):
    frozen.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "config.json").read_text())) == set(CONFIG)


def test_every_field_of_the_header_has_a_row(frozen, tmp_path):
    frozen.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        metadata = file.metadata()
    layout = {f"vpns_hf_layout.{name}" for name in json.loads(metadata["vpns_hf_layout"])}
    assert set(metadata) | layout == set(HEADER)


def test_every_field_of_the_record_has_a_row(tmp_path):
    RunRecord(tmp_path, {"a": 1}, [FinishedStage("tune", 3, {"eval_accuracy": 0.5})]).save()
    content = json.loads((tmp_path / STAGES_NAME).read_text())
    (stage,) = content["finished"]
    names = {f"finished.{name}" for name in stage} | {f"finished.cost.{name}" for name in stage["cost"]}
    assert set(content) | names == set(STAGES)


def test_every_field_of_the_card_has_a_row():
    assert {field.name for field in dataclasses.fields(SubnetworkCard)} == CARD


@pytest.mark.parametrize(("cls", "required"), ARGUMENTS)
def test_every_argument_is_checked(cls, required):
    for field in dataclasses.fields(cls):
        if field.init and field.name not in LEFT_TO_TRANSFORMERS:
            with pytest.raises(ValueError, match=f"`{field.name}` is <object"):
                cls(**required | {field.name: object()})


def test_few_arguments_are_left_to_transformers():
    own = set(VPNsTrainingArguments.__annotations__)
    assert own & LEFT_TO_TRANSFORMERS == set()
    assert len(LEFT_TO_TRANSFORMERS) == 6


@pytest.mark.parametrize("table", [CONFIG, STAGES, HEADER])
def test_tests_of_the_table_exist(table):
    text = "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    defined = set(re.findall(r"def (test_\w+)\(", text))
    assert {test for _, test in table.values()} <= defined


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("finished"),
        lambda content: content.pop("settings"),
        lambda content: content.update(finished={}),
        lambda content: content.update(settings=[]),
        lambda content: content.update(finished=[3]),
        lambda content: content["finished"][0].pop("name"),
        lambda content: content["finished"][0].update(name=3),
        lambda content: content["finished"][0].update(steps=-1),
        lambda content: content["finished"][0].update(steps="3"),
        lambda content: content["finished"][0].update(metrics={"a": "b"}),
        lambda content: content["finished"][0].update(metrics=[]),
        lambda content: content["finished"][0].update(score_learning_rate="fast"),
        lambda content: content["finished"][0].update(cost=3),
        lambda content: content["finished"][0].update(unknown=3),
        lambda content: content["finished"][0]["cost"].update(seconds="long"),
        lambda content: content["finished"][0]["cost"].update(images=1.5),
        lambda content: content["finished"][0]["cost"].update(unknown=1),
    ],
)
def test_damaged_records_are_refused_in_one_sentence(change, tmp_path):
    RunRecord(tmp_path, {"a": 1}, [FinishedStage("tune", 3, {"eval_accuracy": 0.5})]).save()
    path = tmp_path / STAGES_NAME
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"stages\.json is damaged .* choose another `output_dir`") as caught:
        RunRecord.load(tmp_path, {})
    assert "\n" not in str(caught.value)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"stages\.json is damaged"):
        RunRecord.load(tmp_path, {})


def test_records_come_back_from_a_file(tmp_path):
    record = RunRecord(tmp_path, {"a": 1}, [FinishedStage("tune", 3, {"eval_accuracy": 0.5}, Cost(images=4))])
    record.save()
    assert RunRecord.load(tmp_path, {}) == record
