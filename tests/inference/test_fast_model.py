"""A model for inference gives the logits of the pruned model that it was made of."""

import copy
import io
import pickle

import pytest
import torch
from helpers.models import CONFIGS, tiny_model
from PIL import Image
from torch import nn
from transformers import ViTImageProcessor, pipeline

from vpns_hf.inference import KERNELS, build_fast_model
from vpns_hf.inference.layers import SparseLayer


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def sparse_first(actions):
    """Times in which every kernel is faster than dense ones."""
    return {name: 3.0 if name == "dense" else 1.5 for name in actions}


def dense_first(actions):
    return {name: float(name != "dense") for name in actions}


def frozen(backbone="vit", **kwargs):
    """A model with logits of about 1 that differ from image to image."""
    model = tiny_model(backbone, **{"sparsity": 0.7} | kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith("scores"):
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
            elif name.startswith("prompt."):
                parameter.normal_(std=0.3)
    model.update_masks()
    model.freeze_masks()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        # Running statistics of these images instead of none.
        model.train()(images(32))
    return model.eval()


def images(count=3):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


def sparse_layers(model):
    return [module for module in model.modules() if isinstance(module, SparseLayer)]


@torch.no_grad()
def assert_same_logits(fast, model, x=None, **kwargs):
    x = images() if x is None else x
    expected = model(x, **kwargs).logits
    assert expected.std(0).max() > 0.01
    exact = copy.deepcopy(model).double()(x.double(), **kwargs).logits
    # MobileNetV2 with random weights multiplies the rounding of its own layers to more than that.
    tolerance = max(1e-5, 3 * (expected - exact).abs().max().item())
    torch.testing.assert_close(fast(x, **kwargs).logits, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_of_every_family(family, kernel):
    model = frozen(family)
    fast = model.for_inference(images(1), kernels=[kernel], measure=sparse_first)
    assert len(sparse_layers(fast)) == len(model.masks())
    assert {layer.kernel for layer in fast.report.layers} == {kernel}
    assert_same_logits(fast, model, images(5))
    with torch.no_grad():
        torch.testing.assert_close(fast(images(1)).logits, model(images(1)).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_measured_choice(family):
    model = frozen(family)
    fast = model.for_inference(images(2))
    assert_same_logits(fast, model)
    for layer in fast.report.layers:
        assert layer.kernel == min(layer.milliseconds, key=layer.milliseconds.get)
    chosen = [layer.kernel for layer in fast.report.layers if layer.kernel != "dense"]
    assert len(sparse_layers(fast)) == (0 if fast.report.kept_dense else len(chosen))


def test_each_layer_runs_on_its_fastest_kernel():
    model = frozen()
    names = ["dense", *KERNELS]
    turns = iter(range(100))

    def in_turn(actions):
        if "fast" in actions:
            return {"dense": 2.0, "fast": 1.0}
        fastest = names[next(turns) % len(names)]
        return {name: 1.0 if name == fastest else 3.0 for name in actions}

    fast = model.for_inference(images(1), measure=in_turn)
    layers = dict(fast.model.backbone.named_modules())
    assert len(fast.report.layers) == 14
    for index, layer in enumerate(fast.report.layers):
        assert layer.kernel == names[index % len(names)]
        expected = (nn.Linear, nn.Conv2d) if layer.kernel == "dense" else KERNELS[layer.kernel]
        assert type(layers[layer.name]) in expected
    assert fast.report.speedup == 2
    assert fast.report.kept_dense is None
    assert_same_logits(fast, model)


def test_a_model_that_is_not_faster_stays_dense():
    model = frozen("resnet")

    def slower_together(actions):
        return dense_first(actions) if "fast" in actions else sparse_first(actions)

    fast = model.for_inference(images(1), measure=slower_together)
    assert not sparse_layers(fast)
    assert [type(module) for module in fast.model.backbone.modules()] == [type(m) for m in model.backbone.modules()]
    assert "not faster" in fast.report.kept_dense
    assert fast.report.speedup == 1
    with torch.no_grad():
        assert torch.equal(fast(images()).logits, model(images()).logits)


def test_layers_stay_dense_where_that_is_faster():
    fast = frozen().for_inference(images(1), measure=dense_first)
    assert not sparse_layers(fast)
    assert {layer.kernel for layer in fast.report.layers} == {"dense"}


def test_layers_without_zeros_are_not_measured():
    model = frozen(ignore_modules=["attention"])
    fast = model.for_inference(images(1), measure=sparse_first)
    masks = model.masks()
    for layer in fast.report.layers:
        assert bool(layer.milliseconds) == (f"{layer.name}.weight" in masks)
        density = masks[f"{layer.name}.weight"].float().mean().item() if layer.milliseconds else 1
        assert layer.density == pytest.approx(density)
    assert_same_logits(fast, model)


def test_the_report_is_a_table():
    fast = frozen().for_inference(images(2), kernels=["csr"], measure=sparse_first)
    about, _, head, rule, *rows = fast.report.to_markdown().splitlines()
    assert about == "Input 2 x 3 x 32 x 32, 1 thread: 3.00 ms dense, 1.50 ms with sparse kernels. 2.00 times as fast."
    assert head == "| layer | weight | density | dense ms | csr ms | runs on |"
    assert rule == "| --- | --- | ---: | ---: | ---: | --- |"
    assert len(rows) == 14
    assert rows[0] == ("| vit.embeddings.patch_embeddings.projection | 32 x 3 x 8 x 8 | 30.0% | 3.000 | 1.500 | csr |")


def test_the_model_that_it_was_made_of_stays_as_it_is():
    model = frozen("resnet")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    fast = model.train().for_inference(images(1), measure=sparse_first)
    assert model.training
    assert model.config.state == "frozen"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert trainable == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    logits = fast(images()).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(fast(images()).logits, logits)
    assert not logits.requires_grad


def test_prompt_and_label_mapping():
    model = tiny_model(sparsity=0.7, label_mapping="frequency", num_labels=3, keep_source_head=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.set_label_mapping([4, 0, 2])
    model.freeze_masks()
    fast = model.for_inference(images(1), measure=sparse_first)
    assert fast(images()).logits.shape == (3, 3)
    assert_same_logits(fast, model)
    assert_same_logits(fast, model, use_prompt=True)
    assert not torch.allclose(fast(images()).logits, fast(images(), use_prompt=True).logits)
    model.config.use_prompt = True
    assert_same_logits(model.for_inference(images(1), measure=sparse_first), model)


@pytest.mark.parametrize("family", ["vit", "timm_resnet"])
def test_copies_and_pickles(family, kernel):
    model = frozen(family)
    fast = model.for_inference(images(1), kernels=[kernel], measure=sparse_first)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    others = [
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(buffer, weights_only=False),
    ]
    logits = fast(images()).logits
    for other in others:
        assert torch.equal(other(images()).logits, logits)
        assert other.report == fast.report
    state = fast.state_dict()
    with torch.no_grad():
        for parameter in others[0].parameters():
            parameter.zero_()
    assert not torch.equal(others[0](images()).logits, logits)
    others[0].load_state_dict(state)
    assert torch.equal(others[0](images()).logits, logits)


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_only_kept_values_and_indices_are_stored(family, kernel):
    model = frozen(family)
    fast = model.for_inference(images(1), kernels=[kernel], measure=sparse_first)
    masks, names = model.masks(), dict(model.backbone.named_parameters())
    rest = sum(p.nbytes for name, p in names.items() if name not in masks)
    buffers = sum(b.nbytes for name, b in model.backbone.named_buffers() if not name.endswith("_mask"))
    rows = sum(len(mask) + 1 for mask in masks.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in fast.state_dict().values()}
    prompt = sum(p.nbytes for p in model.prompt.parameters())
    assert sum(stored.values()) == rest + buffers + prompt + 4 * (2 * kept + rows)


def test_what_cannot_be_made_fast_is_refused():
    search = tiny_model()
    with pytest.raises(ValueError, match=r"in the 'search' state. Call `freeze_masks\(\)` first"):
        search.for_inference(images(1))
    search.detach_scores()
    with pytest.raises(ValueError, match="in the 'dense' state"):
        search.for_inference(images(1))
    model = frozen()
    with pytest.raises(ValueError, match=r"`example` is torch.float32 of shape \(3, 32, 32\)"):
        model.for_inference(images(1)[0])
    with pytest.raises(ValueError, match=r"`example` is torch\.float64"):
        model.for_inference(images(1).double())
    with pytest.raises(ValueError, match="`kernels` names 'blocks'; expected some of 'csr'"):
        model.for_inference(images(1), kernels=["csr", "blocks"])
    with pytest.raises(ValueError, match=r"in float32 on the CPU, and this model is torch.bfloat16 on cpu"):
        model.bfloat16().for_inference(images(1))


def test_it_is_not_trained():
    fast = frozen().for_inference(images(1), measure=sparse_first)
    assert not any(module.training for module in fast.modules())
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    fast.eval()
    with pytest.raises(ValueError, match="cannot be trained"):
        fast.train()


def test_layers_whose_weight_is_read_without_a_call_stay_dense():
    class Reading(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return nn.functional.linear(x, self.linear.weight, self.linear.bias)

    model = frozen()
    model.backbone.classifier = Reading(model.backbone.classifier)
    fast = build_fast_model(model, images(1), measure=sparse_first)
    assert type(fast.model.backbone.classifier.linear) is nn.Linear
    assert len(sparse_layers(fast)) == 13
    assert_same_logits(fast, model)


def test_a_batchnorm_is_kept_where_more_than_it_reads_the_convolution():
    class Both(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            x = self.layer.convolution(x)
            return self.layer.normalization(x) + x

    model = frozen("resnet")
    model.backbone.resnet.embedder.embedder = Both(model.backbone.resnet.embedder.embedder)
    fast = model.for_inference(images(1), measure=sparse_first)
    assert any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert_same_logits(fast, model)


def test_pipeline():
    model = frozen()
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    fast = model.for_inference(images(1), measure=sparse_first)
    pictures = [Image.effect_noise((40, 40), 90).convert("RGB"), Image.radial_gradient("L").convert("RGB")]
    expected = pipeline("image-classification", model=model, image_processor=processor, top_k=6)(pictures)
    found = pipeline("image-classification", model=fast, image_processor=processor, top_k=6)(pictures, batch_size=2)
    for one, other in zip(found, expected, strict=True):
        assert [answer["label"] for answer in one] == [answer["label"] for answer in other]
        assert [answer["score"] for answer in one] == pytest.approx([answer["score"] for answer in other], abs=1e-5)
