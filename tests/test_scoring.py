"""completion_logps: packed trees score as a forward pass for each answer does; micro-batches."""

import copy
import functools
import random
import re
from itertools import product
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bench
import data
import dco
import train
from conftest import tiny_llama

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
OTHER_NAMES = {  # of the same settings
    "gpt2": {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "rwkv": {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2},
    "mpt": {"vocab_size": 100, "d_model": 32, "n_layers": 2, "n_heads": 4},
    "gpt_neo": {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_heads": 4,
        "window_size": 30,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
    },  # fmt: skip
}
PHI3 = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOW = {"sliding_window": 6}  # which the trees exceed
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
HALF = {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}
FAMILIES = {  # (family, settings): a window in no layer, in all, or in one of two
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "mistral": ("mistral", {}),
    "cohere": ("cohere", {"logit_scale": 1.0}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "sliding_window": 64}),
    "gpt2": ("gpt2", {}),
    "bert": ("bert", {"is_decoder": True}),  # with weights between the last layer and the head
    "mistral, window": ("mistral", WINDOW),
    "phi3, window": ("phi3", {**WINDOW, **PHI3}),
    "ministral, window": ("ministral", {**WINDOW, "head_dim": 8}),
    "gemma2, window": ("gemma2", {**WINDOW, "head_dim": 8}),
    "gemma3, window": ("gemma3_text", {**MIXED, "head_dim": 8}),
    "cohere2, window": ("cohere2", {**MIXED, "logit_scale": 1.0}),
    "qwen2, window": ("qwen2", HALF),
    "qwen3, window": ("qwen3", {**HALF, "head_dim": 8}),
    "gpt_oss, window": ("gpt_oss", {**WINDOW, "head_dim": 8}),
}
EAGER_ONLY = ("gemma2", "gpt_oss")  # by transformers' own word
CASES = [(name, "eager") for name in FAMILIES]
CASES += [(name, "sdpa") for name, (family, _) in FAMILIES.items() if family not in EAGER_ONLY]


def tiny(family, attention="eager", **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**OTHER_NAMES.get(family, SMALL), **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for weight in model.parameters():  # far from uniform, so that a token in the wrong place shows
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


@functools.cache
def one_llama():
    """A model that no test may change."""
    return tiny_llama(100)


def some_trees(seed, number=8, answers=None):
    """Trees of random tokens, with so many answers, or 2 to 6."""
    rng = random.Random(seed)

    def tokens(least, most):
        return [rng.randrange(100) for _ in range(rng.randint(least, most))]

    trees = []
    for _ in range(number):
        branches = [tokens(2, 5) for _ in range(answers or rng.randint(2, 6))]
        trees.append(data.Tree(tokens(1, 25), branches, rng.randint(0, 1)))
    return trees


def placed(model, **settings):
    """The model as train.py scores with it: logits in float32."""
    train.place(model, train.Config(model="m", device="cpu", **settings))
    return model


def assert_rows(rows, model, trees):
    """Each row holds its tree's log-probs as each answer alone has them, then -inf."""
    assert len(rows) == len(trees)
    for tree, row in zip(trees, rows, strict=True):
        K = len(tree.branches)
        with torch.no_grad():
            alone = dco.plain_logps(model, tree)
        torch.testing.assert_close(row[:K], alone, rtol=1e-4, atol=1e-4)
        assert row[K:].isneginf().all()


# -------------------------------------------------------------------- packed, and each answer alone


@pytest.mark.parametrize("prompt_len", [0, 1])
def test_a_log_prob_is_the_sum_over_the_answers_tokens_each_after_those_before_it(prompt_len):
    """The chain rule, a forward pass a token; a branch may begin with tokens of the prompt."""
    model, prefix, branch = tiny("llama"), [5, 6, 7], [8, 9, 10, 11]
    expected = 0.0
    for n in range(prompt_len, len(branch)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prefix + branch[:n]])).logits[0, -1]
            expected += float((logits.exp() / logits.exp().sum())[branch[n]].log())
    tree = data.Tree(prefix, [branch, [8, 1]], prompt_len)
    assert dco.plain_logps(model, tree).tolist()[0] == pytest.approx(expected, rel=1e-5)


LETTERS = data.Tree(list(range(50)), [[1], [2], [3], [4]])
LONG = data.Tree(list(range(20)), [[20 + k + n for n in range(12)] for k in (0, 13, 26)])


@torch.no_grad()
@pytest.mark.parametrize("name, attention", CASES)
def test_packed_trees_score_as_each_answer_alone(name, attention):
    """And every family passes the check, in bfloat16 as well."""
    family, changes = FAMILIES[name]
    model, trees = tiny(family, attention, **changes), some_trees(1, 5)
    packed = dco.completion_logps(model, trees)
    assert packed.dtype == torch.float32
    assert_rows(packed, model, trees)
    if "window" in name:  # which counts, or this would show nothing
        wide = tiny(family, attention, **{**changes, "sliding_window": 64})
        moved = (dco.completion_logps(wide, trees) - packed).nan_to_num()
        assert moved.abs().max() > 0.1
    assert all(weight.requires_grad for weight in placed(model).parameters())
    for dtype, largest in product(["float32", "bfloat16"], [LETTERS, LONG]):
        config = train.Config(model="m", device="cpu", dtype=dtype)
        train.check_model(model, [[*trees, largest]], config)


PREFIX = st.lists(st.integers(0, 99), min_size=1, max_size=9)
BRANCH = st.lists(st.integers(0, 99), min_size=2, max_size=5)
BRANCHES = st.lists(BRANCH, min_size=2, max_size=4)
TREES = st.lists(st.builds(data.Tree, PREFIX, BRANCHES, st.integers(0, 1)), min_size=2, max_size=4)


@given(TREES)
def test_a_tree_scores_the_same_in_any_company(trees):
    """Whatever lies in the row: no token sees another question, or another answer of its own."""
    with torch.no_grad():
        together = dco.completion_logps(one_llama(), trees)
        for tree, row in zip(trees, together, strict=True):
            alone = dco.completion_logps(one_llama(), [tree])[0]
            torch.testing.assert_close(row[: len(alone)], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_are_those_of_each_answer_alone(tied, gradient_checkpointing):
    """Activations computed twice, too, and the sparse gradient of embeddings that are the head."""
    plain, trees = tiny_llama(100, tie_word_embeddings=tied), some_trees(4)
    model = placed(copy.deepcopy(plain), gradient_checkpointing=gradient_checkpointing)
    scores = dco.completion_logps(model, trees)
    scores[scores.isfinite()].square().sum().backward()
    torch.cat([dco.plain_logps(plain, tree) for tree in trees]).square().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * float(b.grad.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2, window", "cohere"])
def test_letters_do_not_tie_in_bfloat16(name):
    """Scaled or soft-capped, logits in bfloat16 are the same number for some of 100 letters."""
    family, changes = FAMILIES[name]
    model, letters = tiny(family, **changes), data.Tree([1, 2, 3], [[n] for n in range(100)])
    with torch.autocast("cpu", torch.bfloat16):
        assert len(dco.completion_logps(model, [letters]).unique()) < 100
        assert len(dco.completion_logps(placed(model), [letters]).unique()) == 100


# ------------------------------------------------------------------------------- what is in the row


def test_the_example_of_pack_is_what_pack_returns():
    row, scored = dco.pack([data.Tree([11, 12], [[21, 22], [31, 32, 33]])])
    example = {}  # in the docstring: a name and five numbers
    for name, numbers in re.findall(r"(\w+)((?:\s+-?\d+){5})", dco.pack.__doc__):
        example[name] = [int(number) for number in numbers.split()]
    assert row.tolist() == [example[name] for name in ("token", "position", "tree", "answer")]
    assert scored.tolist() == [example[name] for name in ("column", "target", "slot")]
    assert example["position"] == [0, 1, 2, 2, 3] and example["column"] == [1, 2, 1, 3, 4]


def test_nothing_is_fed_but_what_a_tree_counts_and_letters_cost_the_bare_prompt():
    """And logits are computed where something is scored: one column for all letters of a prompt."""
    model, calls = tiny_llama(100), []

    def note(module, positional, named):
        calls.append(named)

    model.register_forward_pre_hook(note, with_kwargs=True)
    letters = [data.Tree(list(range(1, n)), [[1], [2], [3], [4]]) for n in (20, 30, 40)]
    with torch.no_grad():
        scores = dco.completion_logps(model, letters)
        dco.completion_logps(model, some_trees(1))
    assert_rows(scores, one_llama(), letters)
    assert calls[0]["input_ids"].shape == (1, 19 + 29 + 39)
    assert calls[0]["logits_to_keep"].tolist() == [18, 18 + 29, 18 + 29 + 39]
    assert calls[1]["input_ids"].shape == (1, sum(tree.tokens() for tree in some_trees(1)))


def test_scoring_leaves_the_model_as_it_found_it():
    """No hook stays behind, no weight is written to, and no gradient is kept."""
    model = placed(tiny("gemma3_text", **FAMILIES["gemma3, window"][1]))
    versions, config = [w._version for w in model.parameters()], model.config.to_dict()
    dco.check_packing(model, LONG)  # it scores, too
    assert model.config.to_dict() == config and not model.get_input_embeddings()._forward_hooks
    assert [w._version for w in model.parameters()] == versions
    assert all(w.grad is None for w in model.parameters())


def test_the_benchmarks_plain_way_scores_the_same():
    """Else its ratios would compare two different things."""
    trees = some_trees(1)
    with torch.no_grad():
        assert_rows(bench.padded_logps(None, one_llama(), trees), one_llama(), trees)


# ------------------------------------------------------------------------ the check before all else


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
REFUSED = {
    "one token after another, RWKV": functools.partial(tiny, "rwkv"),
    "a window in the settings alone": functools.partial(tiny, "llama", "sdpa", **WINDOW),
    "by place in the row, MPT": functools.partial(tiny, "mpt"),
    "an encoder, XLM-R": functools.partial(tiny, "xlm-roberta"),
    "logits_to_keep is no argument, CPM-Ant": functools.partial(tiny, "cpmant", dim_head=8),
    "a window by place in the row, GPT-Neo": functools.partial(tiny, "gpt_neo"),
    "other positions beside a long text, Phi-3": functools.partial(
        tiny, "phi3", **PHI3, rope_scaling=LONGROPE, original_max_position_embeddings=20
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("model", REFUSED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_is_not_scored_as_transformers_scores_it_is_refused(model, dtype):
    """With both numbers; the largest tree is tried beside the smallest."""
    model, small = REFUSED[model](), data.Tree([3, 4], [[5, 6], [7, 8], [9, 1]])
    config = train.Config(model="m", device="cpu", dtype=dtype)
    with pytest.raises(data.InputError, match="an answer has .* nats packed") as raised:
        train.check_model(model, [[small, LONG]], config)
    packed, expected = re.findall(r"(-\d+\.?\d*) (?:nats|in a plain)", str(raised.value))
    with train.autocast(config):
        plain = torch.cat([dco.plain_logps(model, tree) for tree in (LONG, small)])
    assert expected in [f"{x:.5g}" for x in plain] and packed != expected


def test_where_the_program_trains_there_is_no_noise():
    """GPT-2 has dropout in four places: what is trained is what was scored."""
    model = tiny("gpt2").train()
    assert not torch.equal(dco.completion_logps(model, [LONG]), dco.completion_logps(model, [LONG]))
    placed(model)
    assert_rows(dco.completion_logps(model, [LONG, LETTERS]), tiny("gpt2"), [LONG, LETTERS])


@pytest.mark.parametrize("error", [AssertionError, IndexError, KeyError, torch.OutOfMemoryError])
def test_what_a_model_raises_is_reported_by_its_name_but_not_that_memory_ran_out(error):
    model, config = tiny("llama"), train.Config(model="some/model", device="cpu", dtype="float32")
    model.forward = mock.Mock(side_effect=error("chunked_attention"))
    expected = error if error is torch.OutOfMemoryError else data.InputError
    with pytest.raises(expected) as raised:
        train.check_model(model, [[LONG]], config)
    message = f"--model some/model cannot be trained here: {error.__name__}('chunked_attention')"
    assert str(raised.value) == message or raised.type is error


# ----------------------------------------------------------------------------------- micro-batches


def deal_to_all(sizes, max_tokens, world):
    """The micro-batches of every process."""
    shares = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.dist, "get_world_size", lambda: world)
        for rank in range(world):
            patch.setattr(train.dist, "get_rank", lambda rank=rank: rank)
            shares.append(train.deal(dict(enumerate(sizes)), max_tokens))
    return shares


def test_the_example_of_deal_is_what_deal_returns():
    first, second = deal_to_all([9, 5, 7], 15, 2)
    assert first == [[(0, 1), (1, 1)]] and second == [[(2, 1), (1, 0)]]
    assert f"process 0   {first} " in train.deal.__doc__
    assert f"process 1   {second} " in train.deal.__doc__


SIZES = st.lists(st.integers(1, 99), min_size=1, max_size=40)


@given(SIZES, st.integers(1, 200), st.integers(1, 5))
def test_rows_are_dealt_so_that_each_is_fed_once_and_no_process_waits_long(sizes, most, world):
    """FSDP gathers on all processes at once: had one fed less often, the others would wait."""
    shares = deal_to_all(sizes, most, world)
    counted, loads = [], []
    for groups in shares:
        assert len(groups) == len(shares[0])
        loads.append(0)
        for group in groups:
            tokens = sum(sizes[row] for row, _ in group)
            assert group and (tokens <= most or len(group) == 1)
            counted += [row for row, count in group if count == 1]
            loads[-1] += tokens
    assert sorted(counted) == list(range(len(sizes)))
    assert max(loads) - min(loads) <= max(sizes)
