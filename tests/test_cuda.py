"""What only a GPU can show: `python -m pytest -m cuda` on a machine that has one."""

import dataclasses
import json

import pytest
import torch

import bench
import dco
import test_scoring
import train as program
from conftest import launch, train, weights

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch sees no GPU"),
]
GPU = program.with_defaults(program.Config(model="m", device="cuda", dtype="bfloat16"))


def test_the_embedded_facts_become_consistent_on_a_gpu(tmp_path):
    """NCCL with one process, bfloat16 compute."""
    launch("train.py", "--device", "cuda", "--dtype", "bfloat16", torchrun=1, cwd=tmp_path)
    metrics = json.loads((tmp_path / "runs" / "1" / "metrics.json").read_text())
    for split in ("train", "test"):
        assert metrics[split]["trained"]["clc"][0] > metrics[split]["base"]["clc"][0] + 0.01


@pytest.mark.parametrize("how", [(), ("--shard",)])
def test_a_gpu_trains_what_a_cpu_trains(world, tmp_path, how):
    more = ("--train_questions", 3, "--test_questions", 2)
    train(world, tmp_path / "cpu", *more)
    train(
        world, tmp_path / "cuda", *more, "--device", "cuda", "--dtype", "float32", *how, torchrun=1
    )
    for name, value in weights(tmp_path / "cuda").items():
        wanted = weights(tmp_path / "cpu")[name]
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=2e-4)


def test_sharded_and_checkpointed_in_bfloat16_a_gpu_trains_much_like_a_cpu(world, tmp_path):
    """The README's command for large models, with one process."""
    out, how = tmp_path / "cuda", ("--dtype", "bfloat16", "--shard", "--gradient_checkpointing")
    train(world, tmp_path / "cpu")
    train(world, out, "--device", "cuda", *how, torchrun=1)
    start, *ends = (weights(folder) for folder in (world / "model", tmp_path / "cpu", out))
    moves = [torch.cat([(end[name] - start[name]).flatten() for name in end]) for end in ends]
    assert torch.cosine_similarity(*moves, dim=0) > 0.95


def test_a_micro_batch_takes_the_memory_that_the_trace_says():
    """Of SmolLM2's shape, checkpointed; the trace knows no work space of CUDA's libraries."""
    config, trees = dataclasses.replace(GPU, gradient_checkpointing=True), test_scoring.some_trees
    traced_config = dataclasses.replace(config, model="135M", device="cpu")
    _, traced = bench.trace(1, traced_config, trees(1, 64))
    model = bench.random_model("135M", "cuda")
    program.place(model, config)
    model.get_input_embeddings().sparse = False  # as the trace has it
    moments = [torch.zeros_like(w) for w in model.parameters() for _ in range(2)]
    torch.cuda.reset_peak_memory_stats()
    with program.autocast(config):
        logps = dco.completion_logps(model, trees(1, 64))
    logps.clamp(min=-99).sum().backward()
    assert len(moments) and abs(torch.cuda.max_memory_allocated() / traced - 1) < 0.15
