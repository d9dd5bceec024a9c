"""Sharing on the Hub: the unmodified client against a real server on loopback, see `hub_server`."""

import functools
import re
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from helpers.hub_server import Fault
from helpers.models import tiny_model
from helpers.recipes import run, write
from helpers.training import fresh, make_trainer
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor, pipeline

from vpns_hf import PromptedSparseModel, VPNsTrainingArguments, storage
from vpns_hf.hub import BEGIN, END, merge_cards, push_folder

MODEL_FILES = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}


def processor():
    return ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def pruned(seed=0, family="vit", **kwargs):
    """A frozen model with other weights and masks for another seed."""
    torch.manual_seed(seed)
    model = tiny_model(family, image_processor=processor(), **kwargs)
    if model.prompt is not None:
        with torch.no_grad():
            next(model.prompt.parameters()).normal_()
    model.freeze_masks()
    return model


def assert_equal(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert set(state) == set(expected)
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []
    assert model.config.state == other.config.state
    assert all(torch.equal(mask, other.masks()[name]) for name, mask in model.masks().items())


def refuses(action, *words):
    """The action raises an OSError of one short line that holds these words."""
    with pytest.raises(OSError, match=r".") as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400, message
    assert [word for word in words if word not in message] == [], message
    return message


def pull(name, **kwargs):
    return lambda: PromptedSparseModel.from_pretrained(name, **kwargs)


# Push and pull -------------------------------------------------------------------------------------------------------


def test_push_and_pull(hub, tmp_path):
    model = pruned()
    commit = model.push_to_hub("me/pruned", commit_description="Why.", tags=["tiny"])
    assert set(hub.files("me/pruned")) == MODEL_FILES
    made, initial = hub.history("me/pruned")
    assert (made.sha, made.title, made.description) == (commit.oid, "Upload model", "Why.")
    assert initial.title == "initial commit"
    (tmp_path / "weights").write_bytes(hub.files("me/pruned")["model.safetensors"])
    assert storage.is_packed(tmp_path / "weights")
    assert hub.storage_tokens == []

    assert_equal(PromptedSparseModel.from_pretrained("me/pruned"), model)
    loaded = AutoModelForImageClassification.from_pretrained("me/pruned", revision=commit.oid)
    assert type(loaded) is PromptedSparseModel
    assert_equal(loaded, model)
    found = AutoImageProcessor.from_pretrained("me/pruned")
    assert found.to_dict() == processor().to_dict() == loaded.image_processor.to_dict()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    classify = pipeline("image-classification", model="me/pruned")
    scores = model(**found(image, return_tensors="pt")).logits.softmax(-1)[0]
    assert {row["label"]: pytest.approx(row["score"], abs=1e-6) for row in classify(image, top_k=6)} == {
        model.config.id2label[index]: score for index, score in enumerate(scores.tolist())
    }

    card = ModelCard.load("me/pruned")
    assert card.data.to_dict() | {"tags": None} == {
        "library_name": "vpns_hf",
        "pipeline_tag": "image-classification",
        "tags": None,
    }
    assert card.data.tags[-1] == "tiny"
    assert "for 6 classes of images, with 50.00% of its prunable weights" in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    scope = {}
    exec(code, scope)
    assert_equal(scope["model"], model)
    again = model.push_to_hub("me/pruned", tags=["tiny"])
    assert again.oid == commit.oid  # nothing has changed


def test_the_command_line_of_the_hub_downloads_it(hub, tmp_path):
    model = pruned()
    model.push_to_hub("me/pruned")
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", "download", "me/pruned", "--local-dir", "here"]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    assert {path.name for path in (tmp_path / "here").iterdir() if path.is_file()} == {*MODEL_FILES, ".gitattributes"}
    assert_equal(PromptedSparseModel.from_pretrained(tmp_path / "here"), model)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
def test_packed_unpacked_and_sharded(hub, packed, max_shard_size):
    model = pruned()
    model.push_to_hub("me/pruned", packed=packed, max_shard_size=max_shard_size)
    names = set(hub.files("me/pruned"))
    assert ("model.safetensors.index.json" in names) == (max_shard_size == "20KB")
    shards = 1 if max_shard_size == "50GB" else 4 if packed else 7
    assert len([name for name in names if name.endswith(".safetensors")]) == shards
    assert_equal(PromptedSparseModel.from_pretrained("me/pruned"), model)
    assert_equal(PromptedSparseModel.from_pretrained("me/pruned", device_map="auto"), model)
    half = PromptedSparseModel.from_pretrained("me/pruned", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert all(torch.equal(mask, model.masks()[name]) for name, mask in half.masks().items())

    other = pruned(seed=1)
    other.push_to_hub("me/pruned")
    assert set(hub.files("me/pruned")) == MODEL_FILES  # no shard of the earlier model is left
    assert len(hub.history("me/pruned")) == 3
    assert_equal(PromptedSparseModel.from_pretrained("me/pruned"), other)


@pytest.mark.parametrize("state", ["search", "dense"])
def test_models_that_are_not_pruned_yet(hub, state):
    torch.manual_seed(0)
    model = tiny_model("timm_resnet", scope="global", sparsity=0.7)
    if state == "dense":
        model.detach_scores()
    model.push_to_hub("me/searching")
    assert set(hub.files("me/searching")) == MODEL_FILES - {"preprocessor_config.json"}
    assert_equal(PromptedSparseModel.from_pretrained("me/searching"), model)
    assert ("still being learned" in ModelCard.load("me/searching").text) == (state == "search")


def test_revisions(hub):
    first, second = pruned(), pruned(seed=1)
    first.push_to_hub("me/pruned")
    HfApi().create_tag("me/pruned", tag="v1")
    second.push_to_hub("me/pruned", revision="next")
    second.push_to_hub("me/pruned", revision="next", commit_message="Again", tags=["new"])
    assert [commit.title for commit in hub.history("me/pruned", "next")][:2] == ["Again", "Upload model"]
    assert len(hub.history("me/pruned")) == 2
    second.push_to_hub("me/pruned")
    for revision, model in {"v1": first, "next": second, "main": second}.items():
        assert_equal(PromptedSparseModel.from_pretrained("me/pruned", revision=revision), model)
    refuses(pull("me/pruned", revision="v3"), "Could not load me/pruned", "no branch, tag or commit 'v3'")


def test_pull_requests_of_others(hub, monkeypatch):
    mine, yours = pruned(), pruned(seed=1)
    mine.push_to_hub("me/pruned")
    before = hub.files("me/pruned")
    monkeypatch.setenv("HF_TOKEN", "hf_you")
    message = refuses(lambda: yours.push_to_hub("me/pruned"), "Could not push to me/pruned", "refused (403)")
    assert "hf_you" not in message
    proposed = yours.push_to_hub("me/pruned", create_pr=True, commit_message="Better")
    assert proposed.pr_num == 1
    assert hub.files("me/pruned") == before
    assert hub.history("me/pruned", "refs/pr/1")[0].title == "Better"
    assert_equal(PromptedSparseModel.from_pretrained("me/pruned", revision="refs/pr/1"), yours)


def test_private_repositories(hub, tmp_path, monkeypatch):
    model = pruned()
    model.push_to_hub("me/secret", private=True)
    assert_equal(PromptedSparseModel.from_pretrained("me/secret"), model)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    refuses(pull("me/secret"), "there is no such repository, or it is private", "hf auth login")
    refuses(pull("me/secret", token="hf_you"), "it is private and the token does not open it")
    refuses(pull("me/secret", token="hf_typo"), "Could not load me/secret")
    refuses(lambda: model.push_to_hub("me/secret"), "refused (401)", "hf auth login")
    refuses(lambda: model.push_to_hub("pruned"), "Could not push to pruned", "no token was found")
    assert_equal(PromptedSparseModel.from_pretrained("me/secret", token="hf_me"), model)
    assert len(hub.history("me/secret")) == 2


def test_names_without_a_user(hub):
    pruned().push_to_hub("pruned")
    assert 'from_pretrained("me/pruned")' in hub.files("me/pruned")["README.md"].decode()


@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
def test_subfolders(hub, tmp_path, max_shard_size):
    model = pruned()
    model.save_pretrained(tmp_path / "here" / "vit", max_shard_size=max_shard_size)
    HfApi().create_repo("me/several")
    HfApi().upload_folder(repo_id="me/several", folder_path=tmp_path / "here")
    assert_equal(PromptedSparseModel.from_pretrained("me/several", subfolder="vit"), model)
    assert_equal(PromptedSparseModel.from_pretrained(tmp_path / "here", subfolder="vit"), model)
    refuses(pull("me/several", subfolder="swin"), "me/several/swin holds no saved model")
    refuses(pull("me/several"), "me/several holds no saved model: there is no config.json in it")


def test_caches(hub, tmp_path):
    model, cache = pruned(), {"cache_dir": tmp_path / "cache"}
    model.push_to_hub("me/pruned")
    refuses(pull("me/pruned", local_files_only=True, **cache), "not all in the cache", "local_files_only=True")
    PromptedSparseModel.from_pretrained("me/pruned", **cache)
    hub.steps.clear()
    assert_equal(PromptedSparseModel.from_pretrained("me/pruned", local_files_only=True, **cache), model)
    assert hub.steps == []
    PromptedSparseModel.from_pretrained("me/pruned", **cache)
    assert "storage" not in hub.steps
    PromptedSparseModel.from_pretrained("me/pruned", force_download=True, **cache)
    assert "storage" in hub.steps


def test_a_map_of_devices(hub, tmp_path):
    """What does not fit into memory is left on the disk, as for any transformers model."""
    model = pruned()
    model.push_to_hub("me/pruned")
    loaded = PromptedSparseModel.from_pretrained(
        "me/pruned", device_map="auto", max_memory={"cpu": "100KB"}, offload_folder=tmp_path / "offloaded"
    )
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu", "meta"}
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        for use_prompt in (True, False):
            assert torch.equal(
                loaded(images, use_prompt=use_prompt).logits, model(images, use_prompt=use_prompt).logits
            )


def test_a_repository_that_was_deleted(hub, tmp_path):
    model = pruned()
    model.push_to_hub("me/pruned")
    HfApi().delete_repo("me/pruned")
    refuses(pull("me/pruned", cache_dir=tmp_path / "empty"), "there is no such repository")
    model.push_to_hub("me/pruned")
    assert len(hub.history("me/pruned")) == 2


def test_load_subnetwork(hub):
    theirs, mine = pruned(), pruned(seed=1)
    theirs.push_to_hub("me/pruned")
    weights = {name: weight.clone() for name, weight in mine.prunable_weights().items()}
    mine.load_subnetwork("me/pruned", revision="main")
    for name, mask in mine.masks().items():
        assert torch.equal(mask, theirs.masks()[name])
        assert not mine.prunable_weights()[name][~mask].any()
        kept = mask & (weights[name] != 0)
        assert torch.equal(mine.prunable_weights()[name][kept], weights[name][kept])
    assert torch.equal(*(next(model.prompt.parameters()) for model in (mine, theirs)))
    with pytest.raises(ValueError, match=r"(?s)does not fit this ResNet.*in the subnetwork"):
        tiny_model("resnet").load_subnetwork("me/pruned")
    refuses(lambda: mine.load_subnetwork("me/typo"), "Could not load me/typo: there is no such repository")


def test_names_that_are_nothing(hub, tmp_path):
    refuses(pull("me/typo"), "Could not load me/typo: there is no such repository, or it is private")
    refuses(pull(str(tmp_path / "typo")), "this is no local folder, and no Hub id")
    refuses(pull(tmp_path), "holds no saved model")
    with pytest.raises(ValueError, match=r"holds no saved model: expected config\.json"):
        push_folder(tmp_path, "me/nothing")
    assert ("models", "me/nothing") not in hub.repositories


def test_a_data_set(hub, tmp_path):
    rows = datasets.Dataset.from_dict({"label": [0, 1, 1], "text": ["a", "b", "c"]})
    rows.to_parquet(tmp_path / "rows.parquet")
    hub.add("me/rows", {"data/train-00000-of-00001.parquet": (tmp_path / "rows.parquet").read_bytes()}, "datasets")
    assert datasets.load_dataset("me/rows")["train"]["text"][:] == ["a", "b", "c"]


# Cards ---------------------------------------------------------------------------------------------------------------


def test_a_card_that_people_wrote_is_merged_into(hub):
    theirs = "---\nlicense: mit\ntags:\n- mine\nmodel-index: []\n---\n# My words\n\nText.\n"
    hub.add("me/pruned", {"README.md": theirs.encode(), "notes.txt": b"kept"})
    pruned().push_to_hub("me/pruned")
    card = ModelCard.load("me/pruned")
    assert card.text.index("# My words\n\nText.") < card.text.index(BEGIN) < card.text.index(END)
    assert (card.data.license, card.data.library_name) == ("mit", "vpns_hf")
    assert card.data.tags[:2] == ["mine", "vpns_hf"]
    assert hub.files("me/pruned")["notes.txt"] == b"kept"

    edited = str(card).replace("Text.", "More text.").replace("50.00%", "99.99%")
    hub.add("me/pruned", {"README.md": edited.encode()})
    pruned().push_to_hub("me/pruned")
    text = hub.files("me/pruned")["README.md"].decode()
    assert "More text." in text
    assert "50.00%" in text
    assert "99.99%" not in text
    assert text.count(BEGIN) == 1


def test_results_of_other_weights_do_not_stay_on_the_card():
    results = "---\nmodel-index:\n- name: old\n  results: []\n---\n"
    new = ModelCard(f"---\nlibrary_name: vpns_hf\n---\n{BEGIN}\nnew\n{END}\n")
    renewed = merge_cards(ModelCard(f"{results}# Title\n\n{BEGIN}\n90 %\n{END}\n"), new)
    assert "model-index" not in renewed.data.to_dict()
    assert renewed.text.strip() == f"# Title\n\n{BEGIN}\nnew\n{END}"
    foreign = merge_cards(ModelCard(f"{results}# Title\n"), new)
    assert "model-index" in foreign.data.to_dict()
    plain = merge_cards(ModelCard("---\nlicense: mit\n---\n# Theirs\n"), ModelCard("---\nlanguage: en\n---\n# Ours\n"))
    assert (plain.text.strip(), plain.data.license, plain.data.language) == ("# Theirs", "mit", "en")


def test_an_edit_in_between_is_not_lost(hub, monkeypatch):
    model = pruned()
    model.push_to_hub("me/pruned")
    commit = HfApi.create_commit

    def late(self, *args, **kwargs):
        hub.add("me/pruned", {"README.md": b"edited meanwhile"})
        return commit(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", late)
    refuses(lambda: pruned(seed=1).push_to_hub("me/pruned"), "somebody else has pushed in the meantime")
    monkeypatch.undo()
    assert hub.files("me/pruned")["README.md"] == b"edited meanwhile"


# What goes wrong -----------------------------------------------------------------------------------------------------


STEPS = ["create", "info", "resolve", "validate", "preupload", "lfs_batch", "lfs_upload", "commit"]


@pytest.mark.parametrize("revision", [None, "next"])
def test_a_push_that_fails_changes_nothing(hub, revision):
    """The server fails at each step of a push in turn, for as long as the client tries."""
    first, second = pruned(), pruned(seed=1)
    first.push_to_hub("me/pruned")
    refs = dict(hub.repositories["models", "me/pruned"].refs)
    push = functools.partial(second.push_to_hub, "me/pruned", revision=revision)
    for step in STEPS if revision is None else [*STEPS, "branch"]:
        hub.steps.clear()
        hub.faults = [Fault(step, times=7)]
        refuses(push, "Could not push to me/pruned: ", "try again later")
        assert step in hub.steps
        assert hub.repositories["models", "me/pruned"].refs == refs
    hub.faults = []
    push()
    assert_equal(PromptedSparseModel.from_pretrained("me/pruned", revision=revision or "main"), second)


def test_short_failures_are_bridged(hub):
    model = pruned()
    hub.faults = [Fault("preupload", times=2), Fault("lfs_upload", times=1), Fault("lfs_batch", times=1, cut=0)]
    model.push_to_hub("me/pruned")
    hub.faults = [Fault("storage", times=1, cut=1000)]
    hub.steps.clear()
    assert_equal(PromptedSparseModel.from_pretrained("me/pruned"), model)
    assert hub.steps.count("storage") == 2


@pytest.mark.parametrize("fault", [Fault("storage", cut=0), Fault("storage"), Fault("resolve", skip=2)])
def test_a_pull_that_fails_leaves_no_broken_cache(hub, fault):
    model = pruned()
    model.push_to_hub("me/pruned", max_shard_size="20KB")
    hub.faults = [fault]
    refuses(pull("me/pruned"), "Could not load me/pruned: ", "try again")
    hub.faults = []
    assert_equal(PromptedSparseModel.from_pretrained("me/pruned"), model)


def test_a_file_cut_short_again_and_again(hub, monkeypatch):
    """Each answer brings some of the file, so the client gets there."""
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    model = pruned()
    model.push_to_hub("me/pruned")
    size = len(hub.files("me/pruned")["model.safetensors"])
    hub.faults = [Fault("storage", cut=size // 4)]
    hub.steps.clear()
    assert_equal(PromptedSparseModel.from_pretrained("me/pruned"), model)
    assert hub.steps.count("storage") in (4, 5)


def test_without_a_network(hub):
    model = pruned()
    model.push_to_hub("me/pruned")
    PromptedSparseModel.from_pretrained("me/pruned")
    hub.shutdown()
    hub.server_close()
    huggingface_hub.close_session()
    assert_equal(PromptedSparseModel.from_pretrained("me/pruned"), model)
    refuses(pull("me/other"), "Could not load me/other: ", "cannot be reached", "check the network")
    refuses(lambda: model.push_to_hub("me/pruned"), "Could not push to me/pruned: ", "cannot be reached")


# Training ------------------------------------------------------------------------------------------------------------


def pushing_trainer(folder, **kwargs):
    settings = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_model_id": "me/run"}
    model = fresh()
    return make_trainer(folder, model, **{"max_steps": 2, "hub_always_push": True, **settings, **kwargs})


def test_every_save_is_pushed(hub, tmp_path):
    trainer = pushing_trainer(tmp_path / "run", hub_strategy="every_save", save_total_limit=1)
    trainer.processing_class = trainer.model.image_processor = processor()
    trainer.train()
    assert any(path.name == "optimizer.pt" for path in (tmp_path / "run").rglob("*"))
    made = hub.history("me/run")[:-1]
    assert [commit.title.partition(": ")[2] for commit in reversed(made)] == [
        f"{stage}, step {step}" for stage in ("search", "tune") for step in (1, 2)
    ]
    for commit in made:
        assert set(commit.files) == {*MODEL_FILES, ".gitattributes"}
        pushed = PromptedSparseModel.from_pretrained("me/run", revision=commit.sha)
        assert pushed.config.state == ("search" if "search" in commit.title else "frozen")
    (tmp_path / "weights").write_bytes(made[0].files["model.safetensors"])
    assert storage.is_packed(tmp_path / "weights")

    (tmp_path / "run/figures").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "run/figures/prompt.png")
    (tmp_path / "run/recipe.yaml").write_text("seed: 0\n")
    trainer.push_to_hub(license="mit", tags="tiny")
    assert set(hub.files("me/run")) == {*MODEL_FILES, "figures/prompt.png", "recipe.yaml"}
    assert hub.history("me/run")[0].title == "End of training"
    assert_equal(PromptedSparseModel.from_pretrained("me/run"), trainer.model)
    assert ModelCard.load("me/run").data.license == "mit"

    alone = make_trainer(tmp_path / "alone", fresh(), max_steps=2, save_strategy="steps", save_steps=1)
    alone.train()
    assert_equal(alone.model, trainer.model)  # pushing has changed nothing


def test_a_push_in_the_background_may_fail(hub, tmp_path, caplog):
    hub.faults = [Fault("commit", skip=1, times=2)]
    trainer = pushing_trainer(tmp_path / "run", hub_strategy="every_save")
    trainer.train()
    assert [
        record.message.partition(":")[0] for record in caplog.records if "Training continues" in record.message
    ] == ["Could not push to me/run"] * 2
    assert [commit.title for commit in hub.history("me/run")][::-1][1:] == [
        "Training in progress: search, step 1",
        "Training in progress: tune, step 2",
    ]
    hub.faults = [Fault("commit")]
    before = hub.files("me/run")
    refuses(trainer.push_to_hub, "Could not push to me/run: the Hub answered with status 500", "The model is saved in")
    assert hub.files("me/run") == before
    assert_equal(PromptedSparseModel.from_pretrained(tmp_path / "run"), trainer.model)
    hub.faults = []
    trainer.push_to_hub(blocking=False).result()
    assert hub.history("me/run")[0].title == "End of training"


def test_the_files_of_the_run_go_along_with_every_save(hub, tmp_path):
    (tmp_path / "run/figures").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(tmp_path / "run/figures/prompt.png")
    (tmp_path / "run/recipe.yaml").write_text("seed: 0\n")
    trainer = pushing_trainer(tmp_path / "run", hub_strategy="every_save", max_steps=1)
    trainer.train()
    commits = hub.history("me/run")[:-1]
    assert len(commits) == 2
    for commit in commits:
        assert {"figures/prompt.png", "recipe.yaml", "README.md", "model.safetensors"} <= set(commit.files)
        assert commit.files["recipe.yaml"] == b"seed: 0\n"


def test_a_save_is_left_out_while_another_is_pushed(hub, tmp_path, caplog, monkeypatch):
    trainer = pushing_trainer(tmp_path / "run", hub_strategy="every_save", hub_always_push=False)
    checkpoint, publisher = tmp_path / "run" / "0-search" / "checkpoint-1", trainer.publisher
    trainer.save_model(str(checkpoint), _internal_call=True)

    def push():
        publisher.push_checkpoint(trainer.model, checkpoint, "a checkpoint")

    pending = Future()
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "run_as_future", lambda self, *args: pending)
        push()
    push()
    assert len(hub.history("me/run")) == 1
    pending.set_result(None)
    push()
    publisher.wait()
    assert len(hub.history("me/run")) == 2
    (checkpoint / "config.json").unlink()
    push()
    assert "holds no saved model: there is no config.json in it. Training continues" in caplog.text


def test_only_the_end_is_pushed_by_default(hub, tmp_path):
    trainer = pushing_trainer(tmp_path / "run", hub_private_repo=True, max_steps=1)
    trainer.train()
    assert len(hub.history("me/run")) == 1
    trainer.save_model()
    assert [commit.title for commit in hub.history("me/run")] == ["Model save", "initial commit"]
    assert set(hub.files("me/run")) == MODEL_FILES - {"preprocessor_config.json"}
    assert hub.repositories["models", "me/run"].private


def test_a_push_that_was_not_planned(hub, tmp_path):
    trainer = make_trainer(tmp_path / "late", fresh())
    trainer.push_to_hub(revision="search")
    assert_equal(PromptedSparseModel.from_pretrained("me/late", revision="search"), trainer.model)
    assert hub.files("me/late") == {}


def test_hub_arguments(hub, tmp_path, monkeypatch):
    for strategy in ("checkpoint", "all_checkpoints"):
        with pytest.raises(ValueError, match=rf"`hub_strategy='{strategy}'` would publish optimizer states"):
            VPNsTrainingArguments(output_dir=str(tmp_path), push_to_hub=True, hub_strategy=strategy)
    monkeypatch.setenv("HF_TOKEN", "hf_you")
    refuses(lambda: pushing_trainer(tmp_path / "run"), "Could not create me/run on the Hub", "refused (403)")


def test_a_recipe_pushes_a_complete_folder(hub, task):
    run(task, method="hydra", push_to_hub=True, hub_model_id="me/recipe", max_steps=2, references=[])
    assert [commit.title for commit in hub.history("me/recipe")] == ["End of training", "initial commit"]
    figures = {f"figures/{name}.png" for name in ("density", "training", "prompt", "confusion")}
    assert set(hub.files("me/recipe")) == {*MODEL_FILES, *figures, "recipe.yaml", "sparsity_report.json"}
    card = hub.files("me/recipe")["README.md"].decode()
    assert 'from_pretrained("me/recipe")' in card
    assert "## Results" in card
    assert "hf_me" not in "".join(data.decode(errors="ignore") for data in hub.files("me/recipe").values())


@pytest.mark.slow
def test_two_processes_push_once(hub, task):
    settings = dict(
        model_name_or_path="./backbone",
        dataset_name="./data",
        output_dir="./out",
        method="vpns",
        prompt_size=4,
        max_steps=2,
        search_max_steps=2,
        per_device_train_batch_size=5,
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_model_id="me/recipe",
        hub_strategy="every_save",
        hub_always_push=True,
        references=[],
        report_to="none",
        use_cpu=True,
    )
    script = Path(__file__).parents[1] / "recipes" / "prune_vit.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launch, str(script), "--config", str(write(task, **settings))], cwd=task, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    titles = [commit.title for commit in hub.history("me/recipe")]
    assert titles[0] == "End of training"
    assert len(titles) == len(set(titles)) == 8  # warm-up, search and tune of two steps each
    assert {"README.md", "model.safetensors", "recipe.yaml", "figures/training.png"} <= set(hub.files("me/recipe"))
    assert PromptedSparseModel.from_pretrained("me/recipe").config.state == "frozen"


# The documentation ---------------------------------------------------------------------------------------------------


def test_share_it_as_the_guide_says(hub, tmp_path, monkeypatch):
    """The page's code, with a tiny model in place of the demo's; then what it says of the repository."""
    monkeypatch.chdir(tmp_path)
    model, mine = pruned(), pruned(seed=1)
    model.save_pretrained("vpns-demo")
    files = {"recipe.yaml": b"seed: 1", "sparsity_report.json": b"{}", "figures/prompt.png": b"\x89PNG\r\n\x1a\n"}
    for name, content in (files | {"checkpoint-1/optimizer.pt": b"x", "a.bin": b"x"}).items():
        path = tmp_path / "vpns-demo" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    page = (Path(__file__).parents[1] / "docs/guides/share.md").read_text()
    push, load, move, push_all = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    scope = {"mine": mine}
    exec(push, scope)
    assert set(hub.files("me/vit-fashion-vpns-90")) == MODEL_FILES
    assert len(hub.history("me/vit-fashion-vpns-90")) == 2
    exec(load, scope)
    assert_equal(scope["model"], model)
    exec(move, scope)
    assert all(torch.equal(mask, model.masks()[name]) for name, mask in mine.masks().items())
    exec(push_all, scope)
    extra = {"recipe.yaml", "sparsity_report.json", "figures/prompt.png"}
    assert set(hub.files("me/vit-fashion-vpns-90")) == MODEL_FILES | extra
