"""What only a GPU can show: `python -m pytest -m cuda` on a machine that has one."""

import dataclasses
import json

import pytest
import torch

import dco
import test_scoring
from conftest import launch, tiny_llama, train, weights

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch sees no GPU"),
]


def test_the_embedded_facts_become_consistent_on_a_gpu(tmp_path):
    """NCCL with one process, bfloat16 compute."""
    text = launch("train.py", "--device", "cuda", torchrun=1, cwd=tmp_path)
    metrics = json.loads((tmp_path / "runs" / "1" / "metrics.json").read_text())
    assert "computed in bfloat16, on 1 x cuda" in text
    for split in ("train", "test"):
        assert metrics[split]["trained"]["clc"] > metrics[split]["base"]["clc"] + 0.01


@pytest.mark.parametrize("how", [(), ("--shard",), ("--offload",)])
def test_a_gpu_trains_what_a_cpu_trains(world, tmp_path, how):
    more = ("--train_questions", 3, "--test_questions", 2, "--dtype", "float32")
    train(world, tmp_path / "cpu", *more)
    train(world, tmp_path / "cuda", *more, "--device", "cuda", *how, torchrun=1)
    for name, value in weights(tmp_path / "cuda").items():
        wanted = weights(tmp_path / "cpu")[name]
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=2e-4)


def test_bfloat16_scores_are_near_those_of_float32_and_do_not_tie():
    import train as program

    model, trees = tiny_llama(100).cuda(), test_scoring.some_trees(1)
    config = program.Config(model="m", device="cuda")
    with torch.no_grad():
        exact = dco.completion_logps(model, trees)
        with program.autocast(config, torch.device("cuda")):
            rounded = dco.completion_logps(model, trees)
    there = exact.isfinite()
    assert 1e-4 < (exact - rounded)[there].abs().max() < 0.5
    assert len(rounded[there].unique()) == len(exact[there].unique())


def test_a_micro_batch_takes_the_memory_that_the_trace_says():
    """Of SmolLM2's shape, checkpointed; the trace knows no work space of CUDA's libraries."""
    import bench
    import train as program

    config = program.Config(model="m", device="cuda", gradient_checkpointing=True)
    batch = dco.pack(test_scoring.some_trees(1, 64), 576)
    *_, traced = bench.trace("135M", 1, dataclasses.replace(config, device="cpu"), batch)
    model = bench.random_model("135M", "cuda").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    moments = [torch.zeros_like(w) for w in model.parameters() for _ in range(2)]
    torch.cuda.reset_peak_memory_stats()
    batch = dco.pack(test_scoring.some_trees(1, 64), 576, True, torch.device("cuda"))
    with program.autocast(config, torch.device("cuda")):
        logps = dco.completion_logps(model, batch)
    logps.clamp(min=-99).sum().backward()
    assert len(moments) and abs(torch.cuda.max_memory_allocated() / traced - 1) < 0.15
