"""Runs a function on two gloo ranks and returns what each of them returned."""

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.spawned import free_port


def _work(rank: int, function: Any, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        results[rank] = function(rank)
    finally:
        dist.destroy_process_group()


def on_two_ranks(function: Any) -> list[Any]:
    """Return ``[function(0), function(1)]``, each evaluated in its own process of one gloo group."""
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(_work, (function, free_port(), results), nprocs=2, start_method="spawn")
        return [results[0], results[1]]
