"""What makes it fast is there and is counted right; times are for bench.py, not for tests."""

import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import bench
import data
import dco
import train
from conftest import ROOT, tiny_llama

TREES = [  # answers of several tokens, of one, and both
    data.Tree([1, 2, 3, 4, 5], [[6, 7, 8], [9, 10], [11]]),
    data.Tree(list(range(30)), [[1], [2], [3], [4]]),
    data.Tree([1], [[2, 3, 4, 5, 6, 7], [8, 9]]),
]


@pytest.mark.parametrize("tree", TREES)
def test_the_benchmark_counts_the_arithmetic_that_torch_counts(tree):
    """Matrix products by torch's counter; pairs in attention by the mask that the model gets."""
    model, masks = tiny_llama(100, attn_implementation="eager"), []
    shape = bench.shape_of(model)
    model.register_forward_pre_hook(
        lambda _, __, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        dco.completion_logps(model, [tree], packed=True)
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    attention = 4 * shape.d * shape.layers * int((masks[0] == 0).sum())
    assert bench.flops(shape, [tree]) == products + attention
    assert sum(w.numel() for name, w in model.named_parameters() if "norm" not in name) == (
        shape.layers * shape.layer + shape.root
    )


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_rows_of_a_step_are_dealt_so_that_no_process_waits_long(seed, world):
    """A language that takes three times the tokens of the other is not left to one process."""
    rng = random.Random(seed)
    lengths = [(rng.randint(5, 10), rng.randint(15, 30)) for _ in range(8)]
    items = [
        train.Item([data.Tree([1] * n, [[1], [2]]) for n in pair], None, None, [0, 1], str(q))
        for q, pair in enumerate(lengths)
    ]
    config = train.Config(model="m", langs=["en", "es"])
    each = [train.assign_microbatches(items, config, True, rank, world) for rank in range(world)]
    shares = [sum(groups, []) for groups in each]
    assert sorted(sum(shares, [])) == [(q, i) for q in range(8) for i in range(2)]
    tokens = [sum(lengths[q][i] for q, i in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(map(max, lengths))
    assert max(tokens) <= 1.5 * sum(tokens) / world


def test_a_sharded_process_without_rows_feeds_one_of_weight_zero_as_often_as_others(monkeypatch):
    """FSDP gathers on all processes at once: had one fed less often, the others would wait."""
    trees = [data.Tree([1, n], [[2], [3]]) for n in range(3)]
    items, model = [train.Item(trees, None, None, [0, 1, 2], "")], tiny_llama(20)
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 2)
    found = {}
    for shard in (True, False):
        config = train.Config(model="m", device="cpu", langs=[*"abc"], shard=shard, max_tokens=1)
        for rank in (0, 1):
            monkeypatch.setattr(train.dist, "get_rank", lambda rank=rank: rank)
            each = train.local_microbatches(model, items, config, True)
            found[shard, rank] = [(*rows.flatten().tolist(), weight) for rows, _, weight in each]
    assert found[False, 0] == [(0, 0, 1.0)] and found[False, 1] == [(0, 1, 1.0), (0, 2, 1.0)]
    assert found[True, 0] == [(0, 0, 2.0), (0, 0, 0.0)]  # the mean over two is the sum
    assert found[True, 1] == [(0, 1, 2.0), (0, 2, 2.0)]


def test_memory_that_torch_frees_is_not_fetched_from_the_system_again():
    """80 MB made and dropped again and again fault in anew, but not after init_distributed."""
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); import torch, train\n"
        "config = train.Config(model='m', device='cpu')\n"
        "if sys.argv[2] == 'reuse': train.init_distributed(config)\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for n in range(60):\n"
        "    if n == 30: begun = faults()\n"
        "    torch.ones(20_000_000)\n"
        "print(faults() - begun)"
    )
    found = {}
    for way in ("reuse", "else"):
        command = [sys.executable, "-c", code, str(ROOT), way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[way] = int(done.stdout)
    if found["else"] < 1000:
        pytest.skip(f"this system's C library keeps memory by itself: {found['else']} page faults")
    assert found["reuse"] < found["else"] / 10
