"""What large models need: the same training in every division over processes, in bfloat16, too."""

import dataclasses
import functools
import sys
from itertools import combinations

import pytest
import torch

import bench
import data
import dco
import test_scoring
import train as program
from conftest import fork, wait, weights

SMALL = {**test_scoring.SMALL, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None}
TEXT = {**SMALL, **test_scoring.MIXED, "head_dim": 8}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
FAMILIES = {
    "gemma3": {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
    "qwen2": {**SMALL, "tie_word_embeddings": True},
    "qwen3": {**SMALL, "head_dim": 8, "tie_word_embeddings": True},
    "cohere": {**SMALL, "logit_scale": 0.5, "pad_token_id": 0},
    "llama": SMALL,
}
LARGE = {"dtype": "bfloat16", "gradient_checkpointing": True, "shard": True}  # the README's command
WAYS = {}  # over two processes: every combination of these
for number in range(4):
    for names in combinations(LARGE, number):
        WAYS[f"two {names}"] = {name: LARGE[name] for name in names}
TREES = test_scoring.some_trees(0, 8, answers=3)
ROWS = [TREES[q : q + 2] for q in range(0, 8, 2)]  # four questions, in two languages
QUESTIONS = [data.Question(str(q), "", 0, {}, {"": ("",) * 3}) for q in range(4)]


def load(path, **settings):
    config = program.Config(model=str(path), langs=["en", "es"], device="cpu", lr=1e-3, epochs=3)
    config = program.with_defaults(dataclasses.replace(config, save_every=0, **settings))
    model, tokenizer = program.load_model(config)
    program.place(model, config)
    return model, tokenizer, config


def train_one(folder, family, way, **settings):
    """Three updates; the model is saved under the name of the way."""
    model, tokenizer, config = load(folder / family, **settings)
    base = program.score(model, QUESTIONS, ROWS, config)
    gamma = program.gamma_matrix(config)
    log = list(program.train(model, QUESTIONS, ROWS, base, gamma, config))
    program.save_model(model, tokenizer, folder / way / family)
    scores = torch.stack([base, program.score(model, QUESTIONS, ROWS, config)])
    return {"log": log, "scores": scores}


def train_all(folder):
    """What each of two processes does: every family in every way."""
    program.init_distributed(program.Config(device="cpu"))
    for family in FAMILIES:
        for way, settings in WAYS.items():
            result = train_one(folder, family, way, **settings)
            if program.dist.get_rank() == 0:
                torch.save(result, folder / way / family / "result.pt")
    program.dist.destroy_process_group()
    sys.exit()


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """Where models of all families, in bfloat16 as they are published, were trained by two."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("families")
    for family, settings in FAMILIES.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / family)
        AutoTokenizer.from_pretrained(world / "model").save_pretrained(folder / family)
    statuses, text = wait(fork("train.py", [], 2, functools.partial(train_all, folder)))
    assert statuses == [0, 0], text
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_the_same_however_it_is_divided(folder, process_group, family):
    """In bfloat16 nearly so; what is saved scores as what was trained. Image parts do not train."""
    one = train_one(folder, family, "one")
    model, _, config = load(folder / "one" / family)
    again = program.score(model, QUESTIONS, ROWS, config)
    torch.testing.assert_close(again, one["scores"][1], rtol=1e-4, atol=1e-4)
    before, wanted = weights(folder / family), weights(folder / "one" / family)
    frozen = {name for name in before if "vision_tower" in name or "projector" in name}
    assert bool(frozen) == (family == "gemma3") != all(x.requires_grad for x in model.parameters())
    names = before.keys() - frozen
    for way in WAYS:
        after = weights(folder / way / family)
        assert after.keys() == before.keys()
        exact = "dtype" not in WAYS[way]
        for name, weight in after.items():
            assert weight.dtype == torch.float32
            assert torch.equal(before[name].float(), weight) == (name in frozen), name
            if exact:  # each element has moved by up to 3e-3
                torch.testing.assert_close(weight, wanted[name], rtol=1e-4, atol=2e-4)
        moves = [torch.cat([(x[n] - before[n]).flatten() for n in names]) for x in (after, wanted)]
        assert torch.cosine_similarity(*moves, dim=0) > 0.99
        result = torch.load(folder / way / family / "result.pt")
        near = 1e-3 if exact else 0.1
        for line, wanted_line in zip(result["log"], one["log"], strict=True):
            for key in ("loss", "grad_norm"):  # Adam and clipping hide the gradient's scale
                assert line[key] == pytest.approx(wanted_line[key], rel=near), (way, key)
        gap = (result["scores"] - one["scores"]).abs().max()
        assert gap < 1e-3 if exact else 1e-4 < gap < 0.5


def test_a_layer_is_computed_again_inside_the_hooks_that_fsdp_put_on_it(folder, process_group):
    """Outside, as transformers had it, torch 2.9 to 2.12 does not cast to bfloat16, and crashes."""
    model, _, config = load(folder / "llama", **LARGE)
    layer, calls = model.get_decoder().layers[0], []
    for module in (layer, layer.mlp):
        module.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    dco.completion_logps(model, TREES).sum().backward()
    assert (calls.count(layer), calls.count(layer.mlp)) == (1, 2)


@pytest.mark.parametrize("setting", ["shard", "gradient_checkpointing"])
def test_a_model_whose_layers_are_not_found_is_refused(folder, monkeypatch, process_group, setting):
    monkeypatch.setattr(program, "GradientCheckpointingLayer", type("Other", (), {}))
    with pytest.raises(data.InputError, match=f"{setting}.*: no decoder layers found"):
        load(folder / "llama", **{setting: True})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("world", [1, 2])
def test_the_trace_counts_a_share_of_the_states_and_what_a_step_adds(monkeypatch, tied, world):
    monkeypatch.setitem(bench.SIZES, "tiny", ("llama", 4, 4, 2, 16, 64, 128, 500, tied))
    number = sum(weight.numel() for weight in bench.random_model("tiny", "meta").parameters())
    settings = {"dtype": "bfloat16", "gradient_checkpointing": True, "shard": world > 1}
    config = program.with_defaults(program.Config(model="tiny", device="cpu", **settings))
    states, forward, most = bench.trace(world, config, test_scoring.some_trees(1, 4))
    share = 4 * number / world  # bytes of a process
    assert states == pytest.approx(3 * share, rel=1e-3)  # weights and AdamW's two moments
    assert states < forward < most and 4 * share < most < 6 * share  # gradients, too
