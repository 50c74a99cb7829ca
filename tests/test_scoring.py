"""completion_logps: packed trees against a plain forward pass an answer; micro-batches.

What makes it fast is here, too, but times are for bench.py.
"""

import copy
import inspect
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

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
OTHERWISE = {  # families whose configurations have other names
    "gpt2": {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": 100, "d_model": 32, "n_layers": 2, "n_heads": 4},
    "bloom": {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}
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
    "mistral, window": ("mistral", WINDOW),
    "phi3, window": ("phi3", {**WINDOW, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
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


def tiny(family: str, attention: str = "eager", **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**OTHERWISE.get(family, SMALL), **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for weight in model.parameters():  # far from uniform, so that a token in the wrong place shows
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def some_trees(seed: int, number: int = 8) -> list[data.Tree]:
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(100) for _ in range(rng.randint(low, high))]

    return [
        data.Tree(ids(1, 25), [ids(2, 5) for _ in range(rng.randint(2, 6))], rng.randint(0, 1))
        for _ in range(number)
    ]


def placed(model, **settings):
    """The model as train.py scores with it: logits in float32."""
    train.place(model, train.Config(model="m", device="cpu", **settings))
    return model


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


@torch.no_grad()
@pytest.mark.parametrize("name, attention", CASES)
def test_packed_trees_score_as_each_answer_alone(name, attention):
    family, changes = FAMILIES[name]
    model, trees, moved = tiny(family, attention, **changes), some_trees(1), 0.0
    wide = tiny(family, attention, **{**changes, "sliding_window": 64})
    packed = dco.completion_logps(model, trees)
    K = max(len(tree.branches) for tree in trees)
    assert packed.dtype == torch.float32 and packed.shape == (8, K)
    for tree, row in zip(trees, packed, strict=True):
        plain, n = dco.plain_logps(model, tree), len(tree.branches)
        torch.testing.assert_close(row[:n], plain, rtol=1e-4, atol=1e-4)
        assert row[n:].isneginf().all()
        if "window" in name:
            moved = max(moved, float((dco.plain_logps(wide, tree) - plain).abs().max()))
    assert moved > 0.1 or "window" not in name  # the window counts, or this would show nothing


@given(st.integers(0, 10**6))
@settings(max_examples=20)
def test_a_tree_scores_the_same_in_any_company(seed):
    """Whatever lies in the row: no token sees another question, or another answer of its own."""
    model, trees = tiny_llama(100), some_trees(seed, 6)
    with torch.no_grad():
        together = dco.completion_logps(model, trees)
        for tree, row in zip(trees, together, strict=True):
            alone = dco.completion_logps(model, [tree])[0]
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


def test_log_probs_are_summed_in_float32_under_bfloat16_weights():
    """In bfloat16 a log-prob near -60 is known to 0.25 only; the sum over float32 loses nothing."""
    model = tiny_llama(100).to(torch.bfloat16)
    tree = data.Tree([1, 2, 3], [list(range(20)), list(range(20, 40))])
    with torch.no_grad():
        scores, plain = dco.completion_logps(model, [tree])[0], dco.plain_logps(model, tree)
    assert scores.dtype == plain.dtype == torch.float32
    torch.testing.assert_close(scores, plain, rtol=0, atol=0.3)
    assert (scores != scores.bfloat16()).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bfloat16_autocast_keeps_the_mask(attention):
    """The mask's lowest float32 is no bfloat16: what is masked must stay so, and nothing be NaN."""
    model, trees = tiny("llama", attention), some_trees(5)
    with torch.no_grad():
        exact = dco.completion_logps(model, trees)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = dco.completion_logps(model, trees)
    assert rounded.dtype == torch.float32 and not rounded.isnan().any()
    there = exact.isfinite()
    assert (rounded - exact)[there].abs().mean() < 0.05 * exact[there].abs().mean()


# ------------------------------------------------------------------------------- what is in the row


def test_the_example_of_pack_is_what_pack_returns():
    row, scored = dco.pack([data.Tree([11, 12], [[21, 22], [31, 32, 33]])])
    shown = re.findall(r"(\w+)((?:\s+-?\d+){5})", dco.pack.__doc__)  # a name and five numbers
    shown = {name: [int(number) for number in numbers.split()] for name, numbers in shown}
    assert row.tolist() == [shown[name] for name in ("token", "position", "tree", "answer")]
    assert scored.tolist() == [shown[name] for name in ("column", "target", "slot")]
    assert shown["position"] == [0, 1, 2, 2, 3] and shown["column"] == [1, 2, 1, 3, 4]


def test_nothing_is_fed_but_what_a_tree_counts_and_letters_cost_the_bare_prompt():
    """And logits are computed where something is scored: one column for all letters of a prompt."""
    model, seen = tiny_llama(100), []
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    letters = [data.Tree(list(range(1, n)), [[1], [2], [3], [4]]) for n in (20, 30, 40)]
    with torch.no_grad():
        scores = dco.completion_logps(model, letters)
        dco.completion_logps(model, some_trees(1))
        for tree, row in zip(letters, scores, strict=True):
            logits = model(input_ids=torch.tensor([tree.prefix])).logits[0, -1]
            torch.testing.assert_close(row, logits.log_softmax(-1)[1:5])
    fed = [given["input_ids"].shape for given in seen[:2]]
    assert fed == [(1, 19 + 29 + 39), (1, sum(tree.tokens() for tree in some_trees(1)))]
    assert seen[0]["logits_to_keep"].tolist() == [18, 18 + 29, 18 + 29 + 39]


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
        lambda _, __, given: masks.append(given["attention_mask"]), with_kwargs=True
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        dco.completion_logps(model, [tree])
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    attention = 4 * shape.d * shape.layers * int((masks[0] == 0).sum())
    assert bench.flops(shape, [tree]) == products + attention


def everything_of(model):
    """Each attribute of each module, by identity, with its contents, and what the config says."""
    found = {"config": model.config.to_dict()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            inside = {k: id(v) for k, v in value.items()} if isinstance(value, dict) else None
            found[name, key] = id(value), inside
    return found, {name: (x._version, x.grad) for name, x in model.named_parameters()}


@pytest.mark.parametrize("settings", [None, {}, {"gradient_checkpointing": True}])
def test_scoring_leaves_the_model_as_it_found_it(settings):
    model = tiny("gemma3_text", **FAMILIES["gemma3, window"][1])
    model = model if settings is None else placed(model, **settings)
    before = everything_of(model)
    with torch.no_grad():
        dco.completion_logps(model, some_trees(1))
        dco.plain_logps(model, some_trees(1)[0])
    dco.check_packing(model, some_trees(1)[0])
    assert everything_of(model) == before


# ------------------------------------------------------------------------ the check before all else

LETTERS = data.Tree(list(range(50)), [[1], [2], [3], [4]])
LONG = data.Tree(list(range(20)), [[20 + k + n for n in range(12)] for k in (0, 13, 26)])


@pytest.mark.parametrize("name, attention", CASES)
@pytest.mark.parametrize("way", ["float32", "autocast", "bfloat16"])
def test_every_family_passes_the_check(name, attention, way):
    """By the longest of some trees, as train.py does it."""
    family, changes = FAMILIES[name]
    model, dtype = placed(tiny(family, attention, **changes)), torch.bfloat16
    if way == "float32":
        dtype = torch.float32
    if way == "bfloat16":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        for seed in range(3):
            dco.check_packing(model, max(some_trees(seed), key=data.Tree.tokens), dtype)
        dco.check_packing(model, LETTERS, dtype)


def without_a_mask(model):
    forward = model.forward
    model.forward = lambda attention_mask=None, **rest: forward(**rest)
    return model


def with_a_sink(model):
    """Every token sees the first of the row, as well: right alone, wrong in company."""
    forward = model.forward

    def and_the_first(attention_mask=None, **rest):
        if attention_mask is not None:
            attention_mask[..., 0] = 0.0
        return forward(attention_mask=attention_mask, **rest)

    model.forward = and_the_first
    return model


RECURRENT = {"num_hidden_layers": 3, "intermediate_size": 96, "lru_width": 32}
RECURRENT |= {"attention_window_size": 64, "num_key_value_heads": 1}
REFUSED = {
    "ignores the mask": lambda: without_a_mask(tiny("llama", "sdpa")),
    "sees the row's first token": lambda: with_a_sink(tiny("llama", "sdpa")),
    "a window in the settings alone": lambda: tiny("llama", "sdpa", **WINDOW),
    "by place in the row, MPT": lambda: tiny("mpt"),
    "recurrent": lambda: tiny("recurrent_gemma", **RECURRENT),
}


@pytest.mark.parametrize("model", REFUSED)
@pytest.mark.parametrize("way", ["float32", "autocast", "bfloat16"])
def test_a_model_that_does_not_keep_answers_apart_is_refused(model, way):
    model, dtype = REFUSED[model](), torch.bfloat16
    if way == "float32":
        dtype = torch.float32
    if way == "bfloat16":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        with pytest.raises(ValueError, match="by up to .* nats: it does not take the mask"):
            dco.check_packing(model, LONG, dtype)


@pytest.mark.parametrize("error", [AttributeError, KeyError, ValueError, TypeError, RuntimeError])
def test_what_a_model_raises_that_does_not_know_the_mask_is_told_by_its_name(error):
    model = tiny("llama")
    forward = model.forward

    def without_four_dimensions(attention_mask=None, **rest):
        if attention_mask is not None:
            raise error("chunked_attention")
        return forward(**rest)

    model.forward = without_four_dimensions
    config = train.Config(model="some/model", device="cpu", dtype="float32")
    with pytest.raises(data.InputError, match="some/model cannot be trained here.*chunked"):
        train.check_model(model, [[LONG]], config)
    error = torch.OutOfMemoryError
    with pytest.raises(torch.OutOfMemoryError):
        train.check_model(model, [[LONG]], config)


def test_bloom_which_takes_no_such_mask_is_told_by_its_name():
    config = train.Config(model="bigscience/bloom", device="cpu", dtype="float32")
    with pytest.raises(data.InputError, match="--model bigscience/bloom cannot be trained here"):
        train.check_model(tiny("bloom"), [[LONG]], config)


# ----------------------------------------------------------------------------------- micro-batches


def dealt(monkeypatch, sizes, max_tokens, world):
    """The micro-batches of every process."""
    monkeypatch.setattr(train.dist, "get_world_size", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(train.dist, "get_rank", lambda rank=rank: rank)
        shares.append(train.deal(sizes, max_tokens))
    return shares


def test_the_example_of_deal_is_what_deal_returns(monkeypatch):
    first, second = dealt(monkeypatch, [9, 5, 7], 15, 2)
    assert first == [[(0, 1.0), (1, 1.0)]] and second == [[(2, 1.0), (1, 0.0)]]
    assert f"process 0   {first} " in train.deal.__doc__
    assert f"process 1   {second} " in train.deal.__doc__


@given(
    st.lists(st.integers(1, 99), min_size=1, max_size=40), st.integers(1, 200), st.integers(1, 5)
)
def test_rows_are_dealt_so_that_each_is_fed_once_and_no_process_waits_long(sizes, most, world):
    """FSDP gathers on all processes at once: had one fed less often, the others would wait."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        shares = dealt(monkeypatch, sizes, most, world)
    fed = [pair for groups in shares for group in groups for pair in group]
    assert sorted(row for row, weight in fed if weight == 1) == list(range(len(sizes)))
    assert sum(weight for _, weight in fed) == len(sizes) and len(fed) < len(sizes) + world
    assert len({tuple(len(group) for group in groups) for groups in shares}) == 1
    tokens = [[sum(sizes[row] for row, _ in group) for group in groups] for groups in shares]
    for groups, sums in zip(shares, tokens, strict=True):
        for group, size in zip(groups, sums, strict=True):
            assert group and (size <= most or len(group) == 1)
    each = [sum(sums) for sums in tokens]
    assert max(each) - min(each) <= max(sizes)


@pytest.mark.parametrize("max_tokens", [1, 40, 10**6])
def test_a_table_of_scores_does_not_depend_on_how_rows_are_grouped(process_group, max_tokens):
    model, trees = tiny_llama(100), some_trees(1, 12)
    rows = [trees[q : q + 2] for q in range(0, 12, 2)]  # six questions in two languages
    config = train.with_defaults(train.Config(model="m", device="cpu", max_tokens=max_tokens))
    scores = train.score(model, [], rows, config)
    assert scores.shape == (6, 2, max(len(tree.branches) for tree in trees))
    for tree, row in zip(trees, scores.flatten(0, 1), strict=True):
        with torch.no_grad():
            plain = dco.plain_logps(model, tree)
        torch.testing.assert_close(row[: len(plain)], plain, rtol=1e-4, atol=1e-4)
        assert row[len(plain) :].isneginf().all()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="tells page faults of Linux alone")
def test_memory_that_torch_frees_is_not_fetched_from_the_system_again():
    """80 MB made and dropped again and again fault in anew, but not after train.reuse_memory."""
    code = f"""import ctypes, os, resource, torch
{inspect.getsource(train.reuse_memory)}
def faults(times):
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(20_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun
before = faults(5)
reuse_memory()
faults(30)  # what is freed settles
print(before, faults(5))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    if before < 1000:
        pytest.skip(f"this system's C library keeps memory by itself: {before} page faults")
    assert after < before / 10
