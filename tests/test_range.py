"""Numbers at the edge: no NaN and no overflow, in equations, measures and whole runs."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import dco
import rankc
from conftest import tiny_llama, train, weights

EXTREME = [0.0, -1e-4, -1.0, -88.0, -1e4]  # nats


@given(
    st.integers(2, 4),
    st.integers(2, 6),
    st.sampled_from([0.01, 1.0, 100.0]),
    st.lists(st.sampled_from([1e-6, 1.0, 1e6]), min_size=4, max_size=4),
    st.randoms(use_true_random=False),
)
def test_every_extreme_gives_finite_rewards_losses_gradients_and_measures(L, K, beta, trust, rng):
    draw = lambda: torch.tensor(rng.choices(EXTREME, k=L * K)).view(1, L, K)  # noqa: E731
    ref, logps = draw(), draw().requires_grad_()
    gamma = dco.gamma_from_trust(torch.tensor(trust[:L], dtype=torch.double), beta)
    assert dco.is_consistent(gamma, beta)
    r_align = dco.align_reward(ref, gamma)
    losses = [dco.dco_loss(logps, ref, r_align, beta), dco.sft_loss(logps)]
    losses.append(dco.dpo_loss(logps[..., :2], ref[..., :2], beta))
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss.sum(), logps)
        assert loss.isfinite().all() and gradient.isfinite().all()
        assert float(gradient.abs().max()) <= max(beta, 1) * (1 + 1e-6)  # no loss has a steep place
    optimum = dco.optimal_policy(ref.double(), gamma, beta)  # (1, L, K)
    assert not optimum.isnan().any() and (optimum <= 0).all()
    langs = [f"l{i}" for i in range(L)]
    text, metrics = rankc.report("q", {"base": ref, "optimum": optimum}, ["q"], [0], langs)
    assert "nan" not in text and "inf" not in text
    for stage in ("base", "optimum"):
        assert 0 <= metrics[stage]["clc"][0] <= 1 + 1e-12  # w sums to 1 but for rounding
        assert torch.tensor(metrics[stage]["clc_matrix"]).isfinite().all()


@pytest.mark.parametrize("K", [2, 1000])
def test_two_and_a_thousand_candidates_score_train_and_rank(K):
    model = tiny_llama(60, max_position_embeddings=2048)
    answers = [[k % 50, k % 7] for k in range(K)]
    trees = [data.Tree([5, 6, 7], answers) for _ in range(2)]
    logps = dco.completion_logps(model, trees)
    assert logps.shape == (2, K)
    apart = dco.plain_logps(model, trees[0]._replace(branches=answers[-1:]))
    torch.testing.assert_close(logps[:, -1], apart.expand(2), rtol=0, atol=1e-4)
    r_align = torch.randn(2, K)
    dco.dco_loss(logps, torch.randn(2, K), r_align, 1.0).sum().backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    assert float(rankc.rankc(r_align, r_align)[0]) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    "more",
    [
        ("--trust", "en=1e6", "es=1e-6"),
        ("--trust", "en=1e-6", "es=1e6", "--beta", "100", "--candidates", "0"),
        ("--beta", "0.01"),
        ("--method", "dpo", "--beta", "100"),
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
    held_out = [{**line, "id": f"{line['id']} again", "subject": "test"} for line in lines[1:4]]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines + held_out)))
    out, questions = tmp_path / "out", ("--data", f"jsonl:{tmp_path / 'q.jsonl'}")
    subjects = ("--train_subjects", "even", "odd", "--test_subjects", "test")
    text = train(world, out, *more, *questions, *subjects, "--train_questions", 11)
    text += (out / "log.jsonl").read_text()
    assert not any(word in text for word in (" nan", " inf", "NaN", "null", "Infinity"))
    assert all(weight.isfinite().all() for weight in weights(out).values())
    for line in map(json.loads, (out / "answers.jsonl").read_text().splitlines()):
        assert all(math.isfinite(x) and x < 1e-3 for x in sum(line["trained"].values(), []))


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e400"])
@pytest.mark.parametrize("setting", ["--beta", "--trust", "--lr"])
def test_numbers_out_of_range_are_refused(world, tmp_path, setting, value):
    given = f"en={value}" if setting == "--trust" else value
    text = train(world, tmp_path / "out", f"{setting}={given}", fails=True)
    assert f"error: {setting}" in text and "must be positive and finite" in text
    assert not list(tmp_path.glob("out/*"))
