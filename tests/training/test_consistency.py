"""The hash that processes compare."""

import torch

from vpns_hf.training.consistency import hash_tensor


def test_hash_depends_on_every_bit_and_where_it_stands():
    generator = torch.Generator().manual_seed(0)
    for tensor in (
        torch.randn(50, 40, generator=generator),
        torch.randn(2000, generator=generator).bfloat16(),
        torch.rand(2000, generator=generator) < 0.1,
        torch.randn(20, 3, 5, 5, generator=generator),
    ):
        original = int(hash_tensor(tensor))
        assert original == int(hash_tensor(tensor.clone()))
        seen = {original}
        for index in range(0, tensor.numel(), 97):
            changed = tensor.clone()
            changed.view(-1)[index] = ~changed.view(-1)[index] if tensor.dtype == torch.bool else 0
            seen.add(int(hash_tensor(changed)))
        assert len(seen) == 1 + len(range(0, tensor.numel(), 97))
        assert int(hash_tensor(tensor.flatten().roll(1))) != original


def test_hash_ignores_the_memory_format():
    tensor = torch.randn(4, 3, 5, 5)
    assert hash_tensor(tensor) == hash_tensor(tensor.contiguous(memory_format=torch.channels_last))


def test_hash_of_two_exchanged_entries_differs():
    tensor = torch.randn(1000)
    exchanged = tensor.clone()
    exchanged[[3, 700]] = tensor[[700, 3]]
    assert hash_tensor(tensor) != hash_tensor(exchanged)


def test_hash_sees_an_even_number_of_flipped_signs():
    tensor = torch.rand(1000) + 1
    flipped = tensor.clone()
    flipped[[1, 3, 101, 999]] *= -1
    assert hash_tensor(tensor) != hash_tensor(flipped)


def test_hash_of_a_view_and_of_odd_sizes():
    whole = torch.arange(100, dtype=torch.bfloat16)
    assert hash_tensor(whole[1:8]) == hash_tensor(whole[1:8].clone())
    assert hash_tensor(whole[:3]) != hash_tensor(whole[:4])
    assert hash_tensor(torch.tensor(2.0)) != hash_tensor(torch.tensor(3.0))
    assert hash_tensor(whole[:0]) == 0
