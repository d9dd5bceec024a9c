"""Sparse layers compute what the dense layers compute."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from vpns_hf.inference import KERNELS
from vpns_hf.inference.attention import ProjectedAttention, project_attention
from vpns_hf.inference.batchnorm import fold_batchnorms


@pytest.fixture(params=KERNELS)
def kernel(request):
    return KERNELS[request.param]


def pruned(layer, density=0.2):
    with torch.no_grad():
        layer.weight.mul_(torch.rand(layer.weight.shape) < density)
    return layer


def assert_same(sparse, dense, x):
    expected = dense(x)
    found = sparse(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


SHAPES = [(), (1,), (1, 7), (2, 8), (33,), (3, 5, 13), (2, 300), (0,), (2, 0, 4)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(5, 3, True), (24, 64, False), (41, 19, True)])
@torch.no_grad()
def test_linear(kernel, inputs, outputs, bias, threads):
    torch.set_num_threads(threads)
    layer = pruned(nn.Linear(inputs, outputs, bias))
    sparse = kernel[0](layer)
    for shape in SHAPES:
        assert_same(sparse, layer, torch.randn(*shape, inputs))


@torch.no_grad()
def test_linear_of_a_transposed_input(kernel):
    layer = pruned(nn.Linear(24, 16))
    assert_same(kernel[0](layer), layer, torch.randn(24, 30).t())


@torch.no_grad()
def test_rows_without_any_weight(kernel):
    layer = pruned(nn.Linear(8, 6), density=0)
    assert_same(kernel[0](layer), layer, torch.randn(4, 8))
    layer.weight[3, 5] = 2.0
    assert_same(kernel[0](layer), layer, torch.randn(4, 8))


CONVOLUTIONS = {
    "1x1": dict(kernel_size=1),
    "1x1 with a stride": dict(kernel_size=1, stride=2),
    "1x1 with padding": dict(kernel_size=1, padding=1),
    "3x3": dict(kernel_size=3, padding=1),
    "3x3 without padding": dict(kernel_size=3),
    "3x3 with a stride": dict(kernel_size=3, stride=2, padding=1),
    "7x7 with a stride": dict(kernel_size=7, stride=2, padding=3),
    "patches": dict(kernel_size=4, stride=4),
    "patches that overlap": dict(kernel_size=5, stride=3, padding=2),
    "stride larger than the kernel": dict(kernel_size=2, stride=3),
    "dilated": dict(kernel_size=3, dilation=2, padding=2),
    "dilated with a stride": dict(kernel_size=3, dilation=3, stride=2, padding=3),
    "oblong": dict(kernel_size=(1, 5), padding=(0, 2)),
    "oblong, dilated": dict(kernel_size=(3, 2), dilation=(1, 3), padding=(2, 1)),
    "same": dict(kernel_size=4, padding="same"),
    "valid": dict(kernel_size=3, padding="valid"),
    "reflected": dict(kernel_size=3, padding=1, padding_mode="reflect"),
    "grouped": dict(kernel_size=3, padding=1, groups=2),
    "depthwise": dict(kernel_size=3, padding=1, groups=6, stride=2),
    "without bias": dict(kernel_size=3, padding=1, bias=False),
}


@pytest.mark.parametrize("arguments", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@torch.no_grad()
def test_convolution(kernel, arguments):
    layer = pruned(nn.Conv2d(6, 12, **arguments), density=0.3)
    assert kernel[1].fits(layer)
    sparse = kernel[1](layer)
    for threads, size in itertools.product((1, 2), [(8, 8), (13, 17), (40, 6)]):
        torch.set_num_threads(threads)
        assert_same(sparse, layer, torch.randn(2, 6, *size))


@torch.no_grad()
def test_convolution_of_channels_last(kernel):
    layer = pruned(nn.Conv2d(6, 12, 3))
    assert_same(kernel[1](layer), layer, torch.randn(2, 6, 9, 9).to(memory_format=torch.channels_last))


@torch.no_grad()
def test_no_images(kernel):
    layer = pruned(nn.Conv2d(6, 12, 3, 2, 1))
    assert_same(kernel[1](layer), layer, torch.randn(0, 6, 9, 9))


def test_what_fits(kernel):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Renamed(nn.Linear):
        pass

    assert kernel[0].fits(pruned(nn.Linear(30, 30)))
    assert kernel[0].fits(pruned(Renamed(30, 30)))
    assert not kernel[0].fits(pruned(Doubled(30, 30)))
    assert not kernel[0].fits(nn.Linear(30, 30))
    assert not kernel[0].fits(pruned(nn.Conv2d(6, 12, 3)))
    assert not kernel[1].fits(pruned(nn.Linear(30, 30)))
    assert not kernel[1].fits(nn.Conv2d(6, 12, 3))
    assert not kernel[1].fits(pruned(nn.Conv1d(6, 12, 3)))


def test_only_kept_values_and_their_indices_are_stored(kernel):
    layer = pruned(nn.Linear(30, 20))
    sparse, kept = kernel[0](layer), int(layer.weight.count_nonzero())
    tensors = [*sparse.parameters(), *sparse.buffers()]
    # Values and columns, row starts, bias.
    assert sum(tensor.nbytes for tensor in tensors) == 4 * (2 * kept + 21 + 20)
    # No storage behind them is larger.
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 4 * (2 * kept + 21 + 20)
    assert torch.equal(sparse.weight.to_dense(), layer.weight)


@torch.no_grad()
def test_layers_are_copied_and_pickled(kernel):
    layer, x = pruned(nn.Conv2d(6, 12, 3)), torch.randn(2, 6, 9, 9)
    sparse = kernel[1](layer)
    for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(other(x), sparse(x))
        other.load_state_dict(sparse.state_dict())


# Attention -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"kdim": 10, "vdim": 6}])
@torch.no_grad()
def test_projected_attention(arguments, batch_first):
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **arguments).eval()
    for parameter in attention.parameters():
        parameter.copy_(torch.randn_like(parameter))
    parent = nn.ModuleDict({"attention": copy.deepcopy(attention)})
    project_attention(parent)
    projected = parent["attention"]
    assert type(projected) is ProjectedAttention
    query = torch.randn(3, 5, 8)
    key, value = torch.randn(3, 5, arguments.get("kdim", 8)), torch.randn(3, 5, arguments.get("vdim", 8))
    for average in (True, False):
        expected = attention(query, key, value, average_attn_weights=average)
        torch.testing.assert_close(projected(query, key, value, average_attn_weights=average), expected)
    output, weights = projected(query, key, value, need_weights=False)
    assert weights is None
    torch.testing.assert_close(output, expected[0])
    if not arguments:
        unbatched = (query[0], key[0], value[0])
        torch.testing.assert_close(projected(*unbatched), attention(*unbatched))


def test_attention_masks_are_refused():
    projected = ProjectedAttention(nn.MultiheadAttention(8, 2))
    x = torch.randn(3, 5, 8)
    with pytest.raises(ValueError, match="no attention masks"):
        projected(x, x, x, attn_mask=torch.zeros(3, 3))


# BatchNorm -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, **kwargs), nn.BatchNorm2d(4)
        self.free = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.free(self.norm(self.conv(x)).relu())


@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"groups": 2}])
@torch.no_grad()
def test_batchnorm_is_folded(arguments):
    block, x = Block(**arguments), torch.randn(5, 4, 6, 6)
    pruned(block.conv)
    zeros = block.conv.weight == 0
    block(3 * x + 1)
    for norm in (block.norm, block.free):
        norm.weight.copy_(torch.rand(4) + 0.5)
        norm.bias.copy_(torch.randn(4))
    expected = block.eval()(x)
    assert fold_batchnorms(block, x) == 1
    assert type(block.norm) is nn.Identity
    assert type(block.free) is nn.BatchNorm2d
    assert torch.equal(block.conv.weight == 0, zeros)
    torch.testing.assert_close(block(x), expected)


@torch.no_grad()
def test_a_convolution_that_is_called_twice_is_not_folded():
    class Twice(Block):
        def forward(self, x):
            return self.norm(self.conv(self.conv(x)))

    block, x = Twice().eval(), torch.randn(5, 4, 6, 6)
    expected = block(x)
    assert fold_batchnorms(block, x) == 0
    assert torch.equal(block(x), expected)
