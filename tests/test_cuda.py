"""What only a GPU can show: `python -m pytest -m cuda` on a machine that has one."""

import warnings

import pytest
import torch

import data
import test_scoring
import train as program
from conftest import assert_same, command, launch, read, tiny_llama, train, weights
from test_survival import RUN, killed

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch sees no GPU"),
]
LARGE = ("--shard", "--gradient_checkpointing")  # the README's command for large models
WAYS = [(), LARGE[:1], LARGE[1:], LARGE]


def test_the_embedded_facts_become_consistent_on_a_gpu(tmp_path):
    """NCCL with one process, bfloat16 compute."""
    launch("train.py", "--device", "cuda", "--dtype", "bfloat16", torchrun=1, cwd=tmp_path)
    metrics = read(tmp_path / "runs" / "1", "metrics.json")
    for split in ("train", "test"):
        assert metrics[split]["trained"]["clc"][0] > metrics[split]["base"]["clc"][0] + 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("gpus", [1, 2])
def test_gpus_train_what_a_cpu_trains(world, tmp_path, gpus, way, dtype):
    """In float32 the same. In bfloat16 much alike: sharded and checkpointed, it once crashed."""
    if gpus > torch.cuda.device_count():
        pytest.skip("there is but one GPU")
    train(world, tmp_path / "cpu")
    train(world, tmp_path / "gpu", "--device", "cuda", "--dtype", dtype, *way, torchrun=gpus)
    near = 0.1 if dtype == "bfloat16" else 1e-3
    logs = (read(tmp_path / name, "log.jsonl") for name in ("cpu", "gpu"))
    for line, other in zip(*logs, strict=True):
        for name in ("loss", "grad_norm"):
            assert line[name] == pytest.approx(other[name], rel=near)
    for name, weight in weights(tmp_path / "gpu").items():
        if dtype == "float32":
            wanted = weights(tmp_path / "cpu")[name]
            torch.testing.assert_close(weight, wanted, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("way", [(), LARGE], ids=str)
def test_a_killed_run_goes_on_from_its_checkpoint_on_a_gpu(world, tmp_path, way):
    how = ("--device", "cuda", "--dtype", "float32", *way)
    train(world, tmp_path / "whole", *RUN, *how, processes=1)
    arguments = command(world, tmp_path / "killed", *RUN, *how)
    killed(arguments, 1, "train.step_metrics", call=6)
    assert (tmp_path / "killed" / "checkpoint-4").is_dir()
    launch("train.py", *arguments, processes=1)
    assert_same(tmp_path / "killed", tmp_path / "whole", atol=2e-4)


def test_a_step_waits_for_the_gpu_in_one_place(tmp_path):
    """Where it takes the log-probs of its answers: packing, the loss and AdamW do not wait."""
    config = program.with_defaults(program.Config(model="m", device="cuda", langs=["en", "es"]))
    program.init_distributed(config)
    model, trees = tiny_llama(100), test_scoring.some_trees(0, 16, answers=3)
    program.place(model, config)
    questions = [data.Question(str(q), "", 0, {}, {"": ("",) * 3}) for q in range(8)]
    rows = [trees[q : q + 2] for q in range(0, 16, 2)]
    gamma, base = program.gamma_matrix(config), torch.randn(8, 2, 3)
    steps = program.train(model, questions, rows, base, gamma, config)
    next(steps)  # warms up
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        next(steps)
    torch.cuda.set_sync_debug_mode("default")
    program.dist.destroy_process_group()
    waits = {(w.filename, w.lineno) for w in caught if "synchroniz" in str(w.message)}
    assert len(waits) == 1 and waits.pop()[0] == program.__file__
