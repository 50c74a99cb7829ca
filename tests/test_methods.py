"""What the paper compares DCO with (section 6.1), on tables: whom they train, where it ends."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import dco
import train

LANGS = ["en", "fr", "es", "sw", "de"]
coarse = st.sampled_from([-1.0, -2.0, -3.0])  # so that votes and sums tie


def tables(L=st.integers(3, 5), K=st.integers(2, 4)):
    """(L, K) log-probs as lists."""
    shapes = st.tuples(L, K)
    row = lambda K: st.lists(coarse, min_size=K, max_size=K)  # noqa: E731
    return shapes.flatmap(
        lambda shape: st.lists(row(shape[1]), min_size=shape[0], max_size=shape[0])
    )


def settings(L: int, method: str, **more):
    return train.with_defaults(train.Config(model="m", method=method, langs=LANGS[:L], **more))


def example(table, config, gold=0, id="q", n=0, K=None):
    """The n-th draw from a question whose reference is `table`, (L, K); tokens name its answers."""
    table = torch.as_tensor(table)
    L, K = len(table), K or table.shape[1]
    answers = dict.fromkeys(LANGS[:L], tuple("abcd"[:K]))
    question = data.Question(id, "", gold, dict.fromkeys(LANGS[:L], "x"), answers)
    trees = [data.Tree([0], [[k] for k in range(K)])] * L
    return train.make_example(question, trees, table, n, config)


def chosen(table, config, **more):
    """What each language is trained on, {language: its candidates}."""
    made = example(table, config, **more)
    kept = [[k for [k] in tree.branches] for tree in made.trees]
    return {i: kept[i] for i in made.learns.nonzero()[:, 0].tolist()}


# ------------------------------------------------------------------------------------ the vote


def by_counting(rows: list[list[float]]) -> tuple[int, bool]:
    votes = Counter(row.index(max(row)) for row in rows)
    leaders = sorted(k for k in votes if votes[k] == max(votes.values()))
    return max(leaders, key=lambda k: (sum(row[k] for row in rows), -k)), len(leaders) > 1


@given(tables())
def test_the_majority_is_what_counting_says_with_ties_by_the_summed_log_probs(rows):
    winner, tied = dco.majority_vote(torch.tensor(rows))
    assert (int(winner), bool(tied)) == by_counting(rows)


@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(2, 6), st.randoms())
def test_the_order_of_languages_does_not_change_the_vote(seed, L, K, rng):
    """Also where sums differ by rounding alone: half of the languages mirror the others."""
    table = torch.randn(L, K, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    table = torch.cat([table, table.flip(-1)])
    orders = [rng.sample(range(2 * L), 2 * L) for _ in range(10)]
    assert len({tuple(map(float, dco.majority_vote(table[order]))) for order in orders}) == 1


def test_a_missing_candidate_wins_no_vote_and_other_questions_do_not_matter():
    inf = torch.inf
    split = [[-1.0, -2, -3], [-3.0, -1, -2], [-2.0, -2, -1]]  # a vote each
    table = torch.tensor([[[0.0, -1, -inf]] * 3, [[-5.0, -4, -1]] * 3, split])  # (B, L, K)
    winner, tied = dco.majority_vote(table)
    assert winner.tolist() == [0, 2, 1] and tied.tolist() == [False, False, True]


# ------------------------------------------------------------------------------------ the pairs


@given(tables(), st.sampled_from([0, 1, None]))
def test_calm_trains_the_languages_whose_own_answer_is_not_the_majoritys(rows, gold):
    winner, _ = by_counting(rows)
    own = [row.index(max(row)) for row in rows]
    wanted = {i: [winner, k] for i, k in enumerate(own) if k != winner}
    assert chosen(rows, settings(len(rows), "calm"), gold=gold) == wanted


@given(st.integers(2, 4), st.data(), st.integers(0, 50))
def test_dpo_prefers_gold_over_another_that_all_languages_share_and_sft_takes_gold(K, draw, seed):
    gold, table = draw.draw(st.integers(0, K - 1)), torch.zeros(3, K)
    pairs = chosen(table, settings(3, "dpo", seed=seed), gold=gold)
    assert list(pairs) == [0, 1, 2] and pairs[0] == pairs[1] == pairs[2]
    preferred, other = pairs[0]
    assert preferred == gold and 0 <= other < K and other != gold
    assert chosen(table, settings(3, "sft"), gold=gold) == dict.fromkeys(range(3), [gold])


@given(st.integers(2, 4), st.integers(0, 50), st.integers(0, 6))
def test_dco_may_draw_exactly_as_dpo_does(K, seed, n):
    """Section 6.1: DPO, then DCO on the same instances."""
    ours, theirs = settings(3, "dco", seed=seed, pairs="gold"), settings(3, "dpo", seed=seed)
    table = torch.zeros(3, K)
    assert chosen(table, ours, gold=1, n=n) == chosen(table, theirs, gold=1, n=n)


def test_the_other_answer_of_dpo_is_each_as_often():
    config, other = settings(2, "dpo"), Counter()
    for q in range(3000):
        other[chosen(torch.zeros(2, 4), config, gold=1, id=str(q))[0][1]] += 1
    assert set(other) == {0, 2, 3} and all(abs(n - 1000) < 110 for n in other.values())


@pytest.mark.parametrize("asked", [0, 2, 3])
@pytest.mark.parametrize("K", [2, 3, 4])
def test_dco_draws_as_many_candidates_as_asked_or_all_with_their_reference(asked, K):
    """K of 4 candidates exist; what is not drawn is missing: it is in no pair of Eq. 11."""
    table = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    made = example(table, settings(3, "dco", candidates=asked), K=K)
    drawn = [k for [k] in made.trees[0].branches]
    assert len(set(drawn)) == len(drawn) == min(asked or K, K) and set(drawn) <= set(range(K))
    assert all(tree == made.trees[0] for tree in made.trees) and made.learns.all()
    assert torch.equal(made.ref_logps[:, : len(drawn)], table[:, drawn])
    assert made.ref_logps.shape == (3, 4) and made.ref_logps[:, len(drawn) :].isneginf().all()


# ------------------------------------------------------------------------------------ where it ends


def descend(method: str, reference: torch.Tensor, golds: list, steps: int, rate: float, **more):
    """Gradient descent on a policy that is a table, (Q, L, K), on the pairs a run would take.

    Returns log pi, and the pairs that were trained: (question, language, preferred, other).
    """
    config, rows, pairs = settings(reference.shape[1], method, **more), [], []
    for q, gold in enumerate(golds):
        made = example(reference[q], config, gold=gold, id=str(q))
        for i in made.learns.nonzero()[:, 0].tolist():
            kept = [k for [k] in made.trees[i].branches]
            rows.append((q, i, kept, made.ref_logps[i, : len(kept)]))
            pairs.append((q, i, kept[0], kept[-1]))
    policy = reference.clone().requires_grad_()
    for _ in range(steps):
        logps, loss = policy.log_softmax(-1), 0.0
        for q, i, kept, ref in rows:  # r_ALIGN, 0 here, is DCO's alone
            loss = loss + train.language_loss(logps[q, i, kept], ref, 0 * ref, config)
        (gradient,) = torch.autograd.grad(loss, policy)
        policy.data -= rate * gradient
    return policy.detach().log_softmax(-1), pairs


@pytest.fixture(scope="module")
def reference():
    g = torch.Generator().manual_seed(5)
    return torch.randn(3, 6, 4, generator=g).transpose(0, 1).mul(2).log_softmax(-1)


def test_dpo_prefers_the_gold_answer_on_every_training_pair_at_convergence(reference):
    golds = [0, 1, 2, 3, 0, 1]
    logps, pairs = descend("dpo", reference, golds, 400, 3.0, beta=0.5)
    assert len(pairs) == 18
    for q, i, preferred, other in pairs:
        assert preferred == golds[q] and logps[q, i, preferred] > logps[q, i, other]
    assert any(reference[q, i, w] < reference[q, i, l] for q, i, w, l in pairs)  # noqa: E741


def test_sft_makes_the_gold_answer_the_likeliest_in_every_language(reference):
    golds = [0, 1, 2, 3, 0, 1]
    logps, _ = descend("sft", reference, golds, 300, 0.2)
    assert (logps.argmax(-1).T == torch.tensor(golds)).all() and logps.amax(-1).min() > -0.2


def test_calm_brings_every_language_over_to_the_majority_and_leaves_the_others_alone(reference):
    logps, pairs = descend("calm", reference, [None] * 6, 400, 3.0, beta=0.5)
    own, trained = reference.argmax(-1), {(q, i) for q, i, *_ in pairs}
    for q in range(6):
        winner, _ = by_counting(reference[q].tolist())
        for i in range(3):
            assert ((q, i) in trained) == (own[q, i] != winner)
            if own[q, i] == winner:
                torch.testing.assert_close(logps[q, i], reference[q, i])
            else:
                assert logps[q, i, winner] > logps[q, i, own[q, i]]
