"""Memory shared by the buckets of a step."""

import torch

from lightning_mp.master_weights.scratch import Scratch

CPU = torch.device("cpu")


def test_carved_tensors_have_their_sizes_and_do_not_overlap() -> None:
    block, views = Scratch().carve("weights", CPU, [3, 0, 5])
    assert [view.numel() for view in views] == [3, 0, 5]
    for number, view in enumerate(views):
        view.fill_(number)
    assert block.tolist() == [0.0] * 3 + [2.0] * 5


def test_memory_is_used_again_by_name_and_grows_when_it_must() -> None:
    scratch = Scratch()
    first, _ = scratch.carve("weights", CPU, [8])
    again, _ = scratch.carve("weights", CPU, [4, 2])
    other, _ = scratch.carve("gradients", CPU, [8])
    larger, _ = scratch.carve("weights", CPU, [9])
    assert again.data_ptr() == first.data_ptr()
    assert other.data_ptr() != first.data_ptr()
    assert larger.numel() == 9
