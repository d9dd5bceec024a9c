"""PromptedSparseModel: building, heads, states, copies, refusals."""

import copy
import json

import pytest
import timm
import torch
from helpers.models import CONFIGS, TRANSFORMER, tiny_backbone, tiny_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from vpns_hf import PromptedSparseModel, SparsityReport

IMAGES, LABELS = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32), torch.tensor([0, 1])


@pytest.fixture
def folder(tmp_path):
    tiny_backbone("vit").save_pretrained(tmp_path)
    ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    ).save_pretrained(tmp_path)
    return str(tmp_path)


def test_from_a_local_folder(folder):
    model = PromptedSparseModel.from_backbone(folder, prompt_size=4)
    assert model.config.image_size == [32, 32]
    assert model.config.image_mean == [0.1, 0.2, 0.3]
    assert model.config.image_std == [0.4, 0.5, 0.6]
    assert model.config.state == "search"
    assert model.sparsity == pytest.approx(0.9, abs=1e-4)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        name for name, _ in model.named_parameters() if name.endswith(".scores") or name.startswith("prompt.")
    }


def test_half_precision_checkpoints_load_in_float32_unless_asked(folder, tmp_path):
    tiny_backbone("vit").half().save_pretrained(tmp_path / "half")
    settings = dict(prompt_size=4, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    assert PromptedSparseModel.from_backbone(str(tmp_path / "half"), **settings).dtype == torch.float32
    model = PromptedSparseModel.from_backbone(str(tmp_path / "half"), dtype=torch.bfloat16, **settings)
    assert model.backbone.classifier.bias.dtype == torch.bfloat16
    assert all(score.dtype == torch.float32 for score in model.scores().values())
    model(IMAGES.bfloat16(), labels=LABELS, use_prompt=True).loss.backward()
    model.save_pretrained(tmp_path / "saved")
    loaded = PromptedSparseModel.from_pretrained(tmp_path / "saved")
    assert {name: t.dtype for name, t in loaded.state_dict().items()} == {
        name: t.dtype for name, t in model.state_dict().items()
    }


def test_same_labels_keep_and_prune_the_head(folder):
    names = {index: f"class {index}" for index in range(6)}
    model = PromptedSparseModel.from_backbone(folder, prompt_size=4, id2label=names)
    assert not model.config.new_head
    assert "classifier.weight" in model.masks()
    assert model.config.id2label == names
    fresh = PromptedSparseModel.from_backbone(folder, prompt_size=4, id2label=names, new_head=True)
    assert fresh.config.new_head
    assert "classifier.weight" not in fresh.masks()
    assert not torch.equal(fresh.backbone.classifier.weight, model.merge_and_unload().classifier.weight)


def test_checkpoint_without_a_head_gets_a_new_one(tmp_path):
    Dinov2Model(Dinov2Config(**TRANSFORMER)).save_pretrained(tmp_path)
    model = PromptedSparseModel.from_backbone(
        str(tmp_path), prompt_size=4, image_mean=[0.5] * 3, image_std=[0.5] * 3, num_labels=2
    )
    assert model.config.new_head
    assert model(IMAGES).logits.shape == (2, 2)


def test_timm_model_object():
    source = timm.create_model("test_vit", num_classes=5).eval()
    model = PromptedSparseModel.from_backbone(source, prompt_size=4, sparsity=0).eval()
    size = model.config.image_size
    images = torch.randn(1, 3, *size)
    torch.testing.assert_close(model(images).logits, source(images))
    assert model.config.image_mean == list(source.pretrained_cfg["mean"])


@pytest.mark.parametrize(
    ("family", "size"),
    [("vit", (48, 40)), ("swin", (64, 64)), ("dinov2", (40, 56)), ("resnet", (40, 72)), ("convnext", (48, 32))],
)
def test_other_image_sizes(family, size, tmp_path):
    model = tiny_model(family, image_size=size)
    images = torch.randn(2, 3, *size)
    expected = model(images, labels=LABELS, use_prompt=True)
    assert expected.logits.shape == (2, 6)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        PromptedSparseModel.from_pretrained(tmp_path)(images, use_prompt=True).logits, expected.logits
    )


@pytest.mark.parametrize("keep_source_head", [False, True])
def test_label_mapping(keep_source_head, tmp_path):
    model = tiny_model("vit", label_mapping="frequency", num_labels=3, keep_source_head=keep_source_head)
    model.set_sparsity(0)
    source = model(IMAGES).logits
    assert source.shape == (2, 6)
    model.set_label_mapping([4, 0, 5])
    torch.testing.assert_close(model(IMAGES).logits, source[:, [4, 0, 5]])
    assert model.masks()["classifier.weight"].shape == ((6, 32) if keep_source_head else (3, 32))
    model.set_sparsity(0.5)
    assert model.sparsity == pytest.approx(0.5, abs=1e-3)
    model(IMAGES, labels=LABELS).loss.backward()
    model.freeze_masks()
    model.save_pretrained(tmp_path)
    loaded = PromptedSparseModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(IMAGES).logits, model(IMAGES).logits)
    assert loaded.config.mapped_labels == [4, 0, 5]
    with pytest.raises(ValueError, match="already set"):
        model.set_label_mapping([1, 2, 3])


@pytest.mark.parametrize("mapping", [[0, 1], [0, 1, 6], [-1, 0, 1]])
def test_unfitting_label_mappings_are_refused(mapping):
    with pytest.raises(ValueError, match="one source class"):
        tiny_model("vit", label_mapping="frequency", num_labels=3).set_label_mapping(mapping)


def train_frozen(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(IMAGES, labels=LABELS).loss.backward()
        optimizer.step()
    weights = dict(model.backbone.named_parameters())
    return all((weights[name][~mask] == 0).all() for name, mask in model.masks().items())


def test_zeros_survive_copies_reloads_and_moves(tmp_path):
    model = tiny_model("vit")
    model.freeze_masks()
    model.save_pretrained(tmp_path)
    model.requires_grad_(False)
    copied = copy.deepcopy(model).requires_grad_(True)
    assert train_frozen(model.requires_grad_(True))
    assert train_frozen(copied)
    assert train_frozen(PromptedSparseModel.from_pretrained(tmp_path))
    assert train_frozen(copy.deepcopy(copied).double().float())


def test_apply_masks_from_elsewhere():
    giver, taker = tiny_model("vit"), tiny_model("vit", sparsity=0.2)
    masks = {name: mask.clone() for name, mask in giver.masks().items()}
    taker.apply_masks(masks)
    assert taker.config.state == "frozen"
    assert taker.sparsity == pytest.approx(0.5, abs=1e-3)
    assert all(torch.equal(mask, masks[name]) for name, mask in taker.masks().items())
    assert train_frozen(taker)
    with pytest.raises(ValueError, match=r"1 names differ, such as classifier.weight"):
        taker.apply_masks({name: mask for name, mask in masks.items() if name != "classifier.weight"})
    with pytest.raises(ValueError, match=r"classifier.weight has shape \(2,\)"):
        taker.apply_masks(masks | {"classifier.weight": torch.ones(2, dtype=torch.bool)})


def test_states_and_their_refusals():
    model = tiny_model("vit")
    assert set(model.scores()) == set(model.masks())
    model.detach_scores()
    assert model.config.state == "dense"
    assert model.sparsity == 0
    with pytest.raises(ValueError, match="in the 'dense' state"):
        model.update_masks()
    model.attach_scores()
    model.set_sparsity(0.25)
    assert model.sparsity == pytest.approx(0.25, abs=1e-3)
    model.freeze_masks()
    assert model.scores() == {}
    with pytest.raises(ValueError, match="needs 'search'"):
        model.set_sparsity(0.5)


def test_sparsity_report():
    model = tiny_model("vit", sparsity=0.75)
    report = model.sparsity_report()
    assert isinstance(report, SparsityReport)
    layers = {layer.name: layer for layer in report.layers}
    assert layers["vit.layers.0.mlp.fc1.weight"].total == 32 * 64
    assert layers["vit.layers.0.mlp.fc1.weight"].macs == 32 * 64 * 17
    assert layers["vit.embeddings.patch_embeddings.projection.weight"].macs == 3 * 32 * 64 * 16
    assert layers["classifier.weight"].kept == round(0.25 * 6 * 32)
    assert report.sparsity == model.sparsity
    assert report.parameters == sum(p.numel() for p in tiny_backbone("vit").parameters())
    assert report.dense_bytes - report.kept_bytes == 4 * (report.total - report.kept)
    assert list(report.blocks()) == [
        "vit.embeddings.patch_embeddings.projection",
        "vit.layers.0",
        "vit.layers.1",
        "classifier",
    ]
    assert sum(block.kept for block in report.blocks().values()) == report.kept
    assert json.loads(report.to_json())["layers"][0]["total"] == 3 * 32 * 64
    assert report.to_markdown().count("\n") == len(report.layers) + 2


def test_saving_keeps_what_it_must(tmp_path):
    model = tiny_model("vit")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert (tmp_path / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="call `push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(ValueError, match="Only frozen masks can be packed"):
        model.save_pretrained(tmp_path, packed=True)


def test_missing_tensors_are_refused(tmp_path):
    model = tiny_model("vit")
    model.save_pretrained(tmp_path, packed=False)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("backbone.classifier.parametrizations.weight.0.scores")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 are missing, unknown or have another shape; backbone.classifier"):
        PromptedSparseModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(sparsity=1.2), "`sparsity` is 1.2"),
        (dict(scope="column"), "`scope` is 'column'"),
        (dict(prompt="frame"), "`prompt` is 'frame'"),
        (dict(prompt_size=16), "`prompt_size` is 16"),
        (dict(image_size=33, prompt=None, backbone="timm_vit"), "does not accept images of \\(33, 33\\)"),
        (dict(image_mean=None), "The image mean is needed"),
        (dict(label_mapping="semantic", num_labels=3), "`label_mapping` is 'semantic'"),
        (dict(label_mapping="frequency"), "pass `num_labels`"),
        (dict(num_labels=3, new_head=False), "it has 6 labels and the task has 3"),
        (dict(num_labels=3, id2label={0: "a"}), "`id2label` names 1 classes"),
        (dict(ignore_modules=["nothing"]), "names 'nothing'"),
        (dict(ignore_modules=["vit", "classifier"]), "has no prunable weight"),
    ],
)
def test_from_backbone_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(kwargs.pop("backbone", "vit"), **kwargs)


def test_what_is_no_image_classifier_is_refused(tmp_path):
    text = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=10)
    BertForSequenceClassification(text).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no image classifier of that type"):
        PromptedSparseModel.from_backbone(str(tmp_path))
    with pytest.raises(ValueError, match="ViTModel is no image classifier"):
        PromptedSparseModel.from_backbone(ViTModel(ViTConfig(**TRANSFORMER)))
    with pytest.raises(ValueError, match="neither a transformers image classifier nor a timm model"):
        PromptedSparseModel.from_backbone(torch.nn.Linear(2, 2))
    with pytest.raises(OSError, match="nobody/nothing"):
        PromptedSparseModel.from_backbone("nobody/nothing")


def test_batch_of_soft_labels_and_missing_prompt():
    model = tiny_model("vit", prompt=None)
    soft = torch.softmax(torch.randn(2, 6), -1)
    expected = -(soft * model(IMAGES).logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(model(IMAGES, labels=soft).loss, expected)
    with pytest.raises(ValueError, match="this model has no prompt"):
        model(IMAGES, use_prompt=True)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny_model("vit").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IMAGES, labels=LABELS, use_prompt=True).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


def test_families_are_all_found():
    assert len(CONFIGS) == 12


def test_load_subnetwork(tmp_path):
    """Masks and prompt are the other's, kept weights stay this model's own."""
    shared = tiny_model("vit", sparsity=0.7)
    torch.nn.init.normal_(shared.prompt.top)
    shared.freeze_masks()
    shared.save_pretrained(tmp_path / "shared")

    model = tiny_model("vit", prompt=None)
    weights = {name: weight.detach().clone() for name, weight in model.prunable_weights().items()}
    model.load_subnetwork(tmp_path / "shared")
    assert model.config.state == "frozen"
    assert model.sparsity == shared.sparsity
    for name, mask in shared.masks().items():
        assert torch.equal(model.masks()[name], mask)
        assert torch.equal(model.prunable_weights()[name], weights[name] * mask)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.prompt(image), shared.prompt(image))
    model.save_pretrained(tmp_path / "mine")
    reloaded = PromptedSparseModel.from_pretrained(tmp_path / "mine")
    assert torch.allclose(reloaded(image, use_prompt=True).logits, model(image, use_prompt=True).logits, atol=1e-6)

    alone = tiny_model("vit", prompt=None)
    alone.load_subnetwork(str(tmp_path / "shared"), prompt=False)
    assert alone.prompt is None


def test_a_new_head_takes_no_mask_of_the_other_head(tmp_path):
    shared = tiny_model("vit")
    shared.freeze_masks()
    shared.save_pretrained(tmp_path)
    model = tiny_model("vit", num_labels=9)
    head = model.prunable_weights().keys() ^ shared.prunable_weights().keys()
    before = model.backbone.classifier.weight.detach().clone()
    model.load_subnetwork(tmp_path)
    assert head == {"classifier.weight"}
    assert all(torch.equal(mask, shared.masks()[name]) for name, mask in model.masks().items())
    assert torch.equal(model.backbone.classifier.weight, before)


def test_load_prompt(tmp_path):
    """The prompt moves alone, also from another backbone; masks and weights stay."""
    shared = tiny_model("deit", prompt="fixed")
    torch.nn.init.normal_(shared.prompt.patch)
    shared.save_pretrained(tmp_path / "shared")
    model = tiny_model("vit", prompt=None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_prompt(tmp_path / "shared")
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.prompt(image), shared.prompt(image))
    assert model.config.prompt == "fixed"
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    with pytest.raises(ValueError, match=r"is made for .*; choose one for the same images"):
        tiny_model("vit", image_mean=[0.1] * 3).load_prompt(tmp_path / "shared")
    tiny_model("vit", prompt=None).save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="has no prompt; name a model that was saved with one"):
        model.load_prompt(tmp_path / "none")


def test_load_subnetwork_names_what_does_not_fit(tmp_path):
    shared = tiny_model("vit")
    shared.save_pretrained(tmp_path / "search")
    shared.freeze_masks()
    shared.save_pretrained(tmp_path / "shared")
    with pytest.raises(ValueError, match="no fixed masks"):
        tiny_model("vit").load_subnetwork(tmp_path / "search")
    other = tiny_model("vit", ignore_modules=["classifier"])
    with pytest.raises(ValueError, match=r"classifier.weight: not in this model"):
        other.load_subnetwork(tmp_path / "shared")
    with pytest.raises(ValueError, match=r"deit.layers.0.*: not in the subnetwork") as error:
        tiny_model("deit").load_subnetwork(tmp_path / "shared")
    assert len(str(error.value).splitlines()) > 10
    with pytest.raises(ValueError, match="is made for"):
        tiny_model("vit", image_mean=[0.1] * 3).load_subnetwork(tmp_path / "shared")


def test_a_loaded_search_trains_what_the_saved_one_trained(tmp_path):
    model = tiny_model("vit")
    model.save_pretrained(tmp_path)
    loaded = PromptedSparseModel.from_pretrained(tmp_path)
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)]
    assert (
        trained[0]
        == trained[1]
        == {n for n, _ in model.named_parameters() if n.startswith("prompt.") or ".scores" in n}
    )
