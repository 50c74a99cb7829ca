"""Numbers at the edge: no NaN and no overflow, in the equations, the measures and whole runs."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import dco
import rankc
from conftest import launch, tiny_llama, train, weights

EXTREME = [0.0, -1e-4, -1.0, -88.0, -1e4]  # nats
TRUST = [1e-6, 1.0, 1e6]
BETA = [0.01, 1.0, 100.0]


@given(
    st.integers(2, 4),
    st.integers(2, 6),
    st.sampled_from(BETA),
    st.lists(st.sampled_from(TRUST), min_size=4, max_size=4),
    st.randoms(use_true_random=False),
)
def test_every_extreme_gives_finite_rewards_losses_gradients_and_measures(L, K, beta, trust, rng):
    draw = lambda: torch.tensor(rng.choices(EXTREME, k=L * K)).view(1, L, K)  # noqa: E731
    ref, logps = draw(), draw().requires_grad_()
    gamma = dco.gamma_from_trust(torch.tensor(trust[:L], dtype=torch.double), beta)
    assert dco.is_consistent(gamma, beta)
    r_align = dco.align_reward(ref, gamma)
    losses = [
        dco.dco_loss(logps, ref, r_align, beta),
        dco.dpo_loss(logps[..., :2], ref[..., :2], beta),
        dco.sft_loss(logps),
    ]
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss.sum(), logps)
        assert loss.isfinite().all() and gradient.isfinite().all()
        assert float(gradient.abs().max()) <= max(beta, 1) * (1 + 1e-6)  # no loss has a steep place
    optimum = dco.optimal_policy(ref.double(), gamma, beta)  # (1, L, K)
    assert not optimum.isnan().any() and (optimum <= 0).all()
    langs = [f"l{i}" for i in range(L)]
    for scores in (ref, optimum):
        report = rankc.measure(scores, ref, [0], langs)
        assert "NaN" not in json.dumps(report) and "Infinity" not in json.dumps(report)
        assert 0 <= report["clc"] <= 1 + 1e-12  # w sums to 1 but for rounding


@pytest.mark.parametrize("K", [2, 1000])
def test_two_and_a_thousand_candidates_score_train_and_rank(K):
    torch.manual_seed(0)
    model = tiny_llama(60, max_position_embeddings=2048)
    answers = [[k % 50, k % 7] for k in range(K)]
    trees = [data.Tree([5, 6, 7], answers) for _ in range(2)]
    logps = dco.completion_logps(model, trees)
    assert logps.shape == (2, K) and logps.isfinite().all()
    apart = dco.completion_logps(model, [data.Tree([5, 6, 7], answers[-1:])])
    torch.testing.assert_close(
        logps[:, -1:].detach(), apart.detach().expand(2, 1), rtol=0, atol=1e-4
    )
    r_align = torch.randn(2, K)
    loss = dco.dco_loss(logps, torch.randn(2, K), r_align, 1.0).sum()
    loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    assert float(rankc.rankc(r_align, r_align)[0]) == pytest.approx(1, abs=1e-12)
    winner, tied = dco.majority_vote(r_align)  # of two languages
    best = r_align.argmax(-1).tolist()
    assert int(winner) in best and bool(tied) == (best[0] != best[1])


@pytest.mark.parametrize(
    "more",
    [
        ("--trust", "en=1e6", "es=1e-6"),
        ("--trust", "en=1e-6", "es=1e6", "--beta", "100"),
        ("--beta", "0.01"),
        ("--beta", "100", "--candidates", "1000"),
        ("--method", "dpo", "--beta", "100"),
        ("--method", "dpo", "--beta", "0.01"),
        ("--method", "calm", "--beta", "100"),
    ],
    ids=" ".join,
)
def test_a_run_at_the_edge_ends_with_finite_numbers(world, tmp_path, more):
    """One question has a thousand candidates, one has equal ones in one language, one is long."""
    lines = [json.loads(line) for line in (world / "q.jsonl").read_text().splitlines()]
    for lang in ("en", "es", "fr"):
        lines[0]["answers"][lang] = [f" {k}" for k in range(1000)]
        lines[1]["answers"][lang] = lines[1]["answers"][lang][:2]
        lines[2]["answers"][lang][0] = " one two three" * 6
    lines[3]["answers"]["es"] = [" dos"] * len(lines[3]["answers"]["es"])
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    more = (*more, "--data", f"jsonl:{tmp_path / 'q.jsonl'}", "--train_questions", 11)
    train(world, out, *more)
    text = "".join(
        (out / name).read_text() for name in ("metrics.json", "log.jsonl", "answers.jsonl")
    )
    assert "NaN" not in text and "Infinity" not in text
    assert all(weight.isfinite().all() for weight in weights(out).values())
    for line in map(json.loads, (out / "answers.jsonl").read_text().splitlines()):
        assert all(math.isfinite(x) and x < 1e-3 for x in sum(line["trained"].values(), []))


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e400"])
@pytest.mark.parametrize("setting", ["--beta", "--trust", "--timeout"])
def test_numbers_out_of_range_are_refused(world, tmp_path, setting, value):
    given = f"en={value}" if setting == "--trust" else value
    text = train(world, tmp_path / "out", f"{setting}={given}", fails=True)
    assert f"error: {setting} " in text and "positive" in text
    assert not (tmp_path / "out").exists()


def test_eval_only_reports_the_edge_as_well(world, tmp_path):
    text = launch(
        "train.py", "--eval_only", "--out", tmp_path / "out", "--model", world / "model",
        "--data", f"jsonl:{world / 'q.jsonl'}", "--langs",
        "en", "es", "--device", "cpu", "--trust", "en=1e6", "es=1e-6", "--beta", "0.01",
    )  # fmt: skip
    assert "optimum" in text and "nan" not in text
