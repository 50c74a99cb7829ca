"""The program as it is run: as processes, on a tiny saved model and questions written here."""

import json
import math
import random
import runpy
import shutil
import sys
from collections import Counter
from dataclasses import asdict, fields, replace
from itertools import combinations

import pytest
import torch
from test_methods import by_counting

import data
import dco
import train as program
from conftest import ROOT, assert_same, launch, tiny_llama, train, weights

LANGS = ["en", "es", "fr"]


@pytest.fixture(scope="module")
def alone(world):
    """A run by one process, and what it printed."""
    out = world / "alone"
    return out, train(world, out)


def read(out, name):
    """A file of a run: .json as it is, .jsonl as the list of its lines."""
    text = (out / name).read_text()
    return json.loads(text) if name.endswith("n") else list(map(json.loads, text.splitlines()))


def top(nats):
    """The number of the best answer."""
    return nats.index(max(nats))


def settings(**more):
    return program.with_defaults(program.Config(**{"model": "m", "device": "cpu", **more}))


def made_up(id, K, langs, gold=0):
    """A question whose texts do not matter, for functions that look at its tokens alone."""
    answers = tuple(f" {letter}" for letter in "abcdefgh"[:K])
    return data.Question(id, "", gold, dict.fromkeys(langs, "x"), dict.fromkeys(langs, answers))


# ------------------------------------------------------------------------------ what a run leaves


def test_a_run_leaves_its_settings_its_log_and_its_answers(world, alone):
    out, text = alone
    given = {"data": f"jsonl:{world / 'q.jsonl'}", "langs": LANGS, "train_questions": 7, "lr": 1e-3}
    given |= {"model": str(world / "model"), "batch_questions": 3, "out": str(out)}
    assert read(out, "run.json") == asdict(settings(**given))

    log = read(out, "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3]  # seven questions: 3 + 3 + 1
    assert [line["lr"] for line in log] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    names = {"step", "loss", "grad_norm", "lr", "tokens", "probability", "rewards/margin"}
    names |= {"consistent", "loss/en", "loss/es", "loss/fr"}
    assert all(set(line) == names for line in log)

    stages, questions = ["base", "optimum", "trained"], read(world, "q.jsonl")
    names = {"id", "subject", "gold", "split", "seen", "prompts", "answers", *stages}
    parts = Counter()
    for line in read(out, "answers.jsonl"):
        assert set(line) == names
        assert line.items() >= questions[int(line["id"])].items()
        assert {len(line[x][y]) for x in stages for y in LANGS} == {len(line["answers"]["en"])}
        assert len({top(nats) for nats in line["optimum"].values()}) == 1  # pi* ranks alike
        parts[line["split"], line["seen"]] += 1
    assert parts == {("train", True): 7, ("test", False): 4}
    for part in ("on 1 x cpu", "| forecast, train", "| train, 7 questions", "| test, 4 questions"):
        assert part in text


def test_the_metrics_are_what_counting_in_the_answers_gives(alone):
    out, _ = alone
    metrics = read(out, "metrics.json")
    assert set(metrics) == {"languages", "train", "test", "tokens", "seconds"}
    assert metrics["languages"] == LANGS
    assert metrics["tokens"] == {"train": sum(line["tokens"] for line in read(out, "log.jsonl"))}
    for split, questions in (("train", 7), ("test", 4)):
        part = metrics[split]
        assert list(part) == ["questions", "chance", "base", "optimum", "trained", "change"]
        lines = [line for line in read(out, "answers.jsonl") if line["split"] == split]
        assert part["questions"] == len(lines) == questions
        assert part["optimum"]["clc"][0] == pytest.approx(1)
        for lang in LANGS:
            right = {}
            for stage in ("base", "trained"):
                hits = [top(line[stage][lang]) == line["gold"] for line in lines]
                right[stage] = sum(hits) / questions
                mass = sum(math.exp(nats) for line in lines for nats in line[stage][lang])
                assert part[stage][f"accuracy/{lang}"][0] == pytest.approx(right[stage])
                assert part[stage][f"probability/{lang}"][0] == pytest.approx(mass / questions)
            changed = [top(line["base"][lang]) != top(line["trained"][lang]) for line in lines]
            assert part["trained"][f"changed/{lang}"][0] == pytest.approx(sum(changed) / questions)
            change = part["change"][f"accuracy/{lang}"][0]
            assert change == pytest.approx(right["trained"] - right["base"])


def test_the_saved_folder_loads_in_transformers_and_scores_the_same(alone):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = alone
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    for line in read(out, "answers.jsonl")[:3]:
        for lang, prompt in line["prompts"].items():
            start = len(tokenizer(prompt)["input_ids"])
            for answer, nats in zip(line["answers"][lang], line["trained"][lang], strict=True):
                ids = torch.tensor([tokenizer(prompt + answer)["input_ids"]])
                with torch.no_grad():
                    logps = model(ids).logits[0, :-1].log_softmax(-1)
                answer_logps = logps.gather(1, ids[0, 1:, None])[start - 1 :]
                assert float(answer_logps.sum()) == pytest.approx(nats, abs=1e-3)


def test_a_model_saved_in_bfloat16_is_scored_with_its_constants_in_float32(world, tmp_path):
    """Gemma 3 multiplies embeddings by a constant that it makes in the dtype it is loaded in."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        Gemma3ForCausalLM,
        Gemma3TextConfig,
    )

    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "head_dim": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=len(tokenizer), **sizes, **heads))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    options = ["--eval_only", "--model", tmp_path / "model", "--out", tmp_path / "out"]
    train(world, tmp_path / "out", *options)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    line = read(tmp_path / "out", "answers.jsonl")[0]
    question = data.Question("", "", None, line["prompts"], line["answers"])
    for lang, nats in line["base"].items():
        ((tree,),) = data.encode(tokenizer, [question], [lang])
        assert nats == pytest.approx(dco.plain_logps(plain, tree).tolist(), abs=1e-3)


def test_an_answer_that_scores_minus_infinity_is_told_and_does_not_count_as_missing(
    world, monkeypatch, process_group
):
    """So does one whose prompt has an infinite logit. Question 4 has three answers, others four."""
    from transformers import AutoTokenizer

    questions = data.load(f"jsonl:{world / 'q.jsonl'}", ["en", "es"])
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    trees = data.encode(tokenizer, questions, ["en", "es"])
    config = settings(device="cpu", max_tokens=1)
    assert program.score(tiny_llama(len(tokenizer)), questions, trees, config).shape == (11, 2, 4)
    scored, spoiled = dco.completion_logps, trees[7][1]

    def spoil(model, batch):
        logps = scored(model, batch)
        return logps.index_fill(1, torch.tensor(3), -torch.inf) if batch == [spoiled] else logps

    monkeypatch.setattr(dco, "completion_logps", spoil)
    with pytest.raises(FloatingPointError, match="1 questions score NaN or infinite: 7$"):
        program.score(tiny_llama(len(tokenizer)), questions, trees, config)


def test_a_run_without_matplotlib_ends_whole_and_says_so(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    text = train(world, tmp_path)
    assert "no picture" in text and "wrote" in text
    assert (tmp_path / "metrics.json").exists() and not (tmp_path / "clc.png").exists()


def test_looks_on_the_way_are_the_reports_and_leave_training_as_it_is(world, alone, tmp_path):
    train(world, tmp_path, "--eval_every", 3)
    assert all(torch.equal(w, weights(alone[0])[x]) for x, w in weights(tmp_path).items())
    log, plain = read(tmp_path, "log.jsonl"), read(alone[0], "log.jsonl")
    assert log[:2] == plain[:2] and log[2].items() > plain[2].items()
    trained = read(tmp_path, "metrics.json")["test"]["trained"]
    for name in ("clc", "clc_en", "accuracy/en", "accuracy/es", "accuracy/fr"):
        assert log[2][f"eval/{name}"] == pytest.approx(trained[name][0])


# ---------------------------------------------------------------------------------- the first loss

ONES = [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
GAMMA = {  # settings -> gamma, where there is one
    "": ONES,
    "--pairs gold": ONES,
    "--candidates 3 --pairs_per_question 2": ONES,
    "--trust en=2 es=0.5 --beta 2": [[0, 0.5, 1], [8, 0, 4], [4, 1, 0]],  # beta w_j / w_i
    "--gamma 0 1 2 0.5 0 1 3 0 0": [[0, 1, 2], [0.5, 0, 1], [3, 0, 0]],
    "--langs en es --gamma 0.1 1": [[0, 0.1], [1, 0]],  # Eq. 6's gamma_1 and gamma_2
    "--method sft": None,
    "--method dpo": None,
    "--method calm": None,
}


def drawn(how, question, base, number):
    """The candidates that each language is trained on, {language: [k]}."""
    if "calm" in how:
        winner, _ = by_counting(list(base.values()))
        own = {lang: top(nats) for lang, nats in base.items()}
        return {lang: [winner, k] for lang, k in own.items() if k != winner}
    order = data.sample(question, question.K, number, 0)
    wrong = next(k for k in order if k != question.gold)
    if "sft" in how:
        candidates = [question.gold]
    elif "dpo" in how or "gold" in how:
        candidates = [question.gold, wrong]
    else:
        candidates = data.sample(question, 3 if "--candidates 3" in how else 2, number, 0)
    return dict.fromkeys(base, candidates)


def first_term(how, base, lang, candidates):
    """A language's term of the loss where the policy is the reference, so that r-hat is 0."""
    if "sft" in how:
        return -base[lang][candidates[0]]
    if GAMMA[how] is None:
        return math.log(2)  # of DPO, and so of CALM
    gamma, gaps = GAMMA[how][list(base).index(lang)], []
    for w, l in combinations(candidates, 2):  # noqa: E741
        margins = [nats[w] - nats[l] for nats in base.values()]
        gaps.append(abs(sum(x * margin for x, margin in zip(gamma, margins, strict=True))))
    return sum(gaps) / len(gaps)


@pytest.fixture(scope="module")
def mixed(world):
    """The questions, half with other answers in each language, so that the languages disagree."""
    lines = read(world, "q.jsonl")
    for line in lines[::2]:
        line["answers"]["es"].reverse()
        line["answers"]["fr"].append(line["answers"]["fr"].pop(0))
    (world / "mixed.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return f"jsonl:{world / 'mixed.jsonl'}"


@pytest.mark.parametrize("how", GAMMA)
def test_the_first_loss_is_its_closed_form_in_the_references_nats(world, mixed, tmp_path, how):
    out, more = tmp_path / "out", ("--data", mixed, *how.split())
    text = train(world, out, *more)
    assert ("warning: Gamma" in text) == ("--gamma" in how)  # these have not rank 1
    bases = {line["id"]: line["base"] for line in read(out, "answers.jsonl")}
    questions = data.load(mixed, read(out, "run.json")["langs"])
    part, _ = data.split(questions, 7, None, 0)
    used = [question for question in part if drawn(how, question, bases[question.id], 0)]
    assert f"{len(used)} of 7 questions" in text and (len(used) < 7) == ("calm" in how)
    draws = [(question, n) for question in used for n in range(1 + ("_question 2" in how))]
    random.Random("order/0/0").shuffle(draws)
    terms, masses = {}, []
    for question, n in draws[:3]:
        base = bases[question.id]
        for lang, ks in drawn(how, question, base, n).items():
            terms.setdefault(lang, []).append(first_term(how, base, lang, ks))
            masses.append(sum(math.exp(base[lang][k]) for k in ks))
    log = read(out, "log.jsonl")
    assert len(log) == math.ceil(len(draws) / 3)
    assert log[0]["loss"] == pytest.approx(sum(map(sum, terms.values())) / len(draws[:3]), rel=1e-4)
    for lang, losses in terms.items():
        assert log[0][f"loss/{lang}"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert log[0]["probability"] == pytest.approx(sum(masses) / len(masses), rel=1e-4)
    assert ("rewards/margin" in log[0]) == ("sft" not in how)
    assert abs(log[0].get("rewards/margin", 0)) < 1e-4  # policy = reference, in whatever company
    if "--method" in how:  # processes change nothing
        train(world, tmp_path / "two", *more, processes=2)
        assert_same(tmp_path / "two", out)


def test_the_logs_margin_and_consistency_are_of_the_first_two_answers():
    g = torch.Generator().manual_seed(0)
    logps, ref, r_align = torch.randn(3, 9, 2, 4, generator=g)  # (B, L, K) each
    learns, losses = torch.rand(9, 2, generator=g) < 0.7, torch.zeros(9, 2)
    metrics = {}
    for method in ("dco", "calm"):
        config, margins = settings(langs=LANGS[:2], method=method, beta=0.5), []
        metrics[method] = program.step_metrics(logps, ref, r_align, losses, learns, config)
        for b, i in learns.nonzero().tolist():
            new, old, target = (x[b, i].tolist() for x in (logps, ref, r_align))
            margin = 0.5 * ((new[0] - old[0]) - (new[1] - old[1]))
            down = method == "dco" and target[0] < target[1]  # DCO's is towards r_ALIGN
            margins.append(-margin if down else margin)
        assert metrics[method]["rewards/margin"] == pytest.approx(sum(margins) / len(margins))
    alike = [(en[0] > en[1]) == (es[0] > es[1]) for en, es in logps.tolist()]
    assert metrics["dco"]["consistent"] == pytest.approx(sum(alike) / 9)


@pytest.mark.parametrize("how", ["--method sft", "--method dpo", "--pairs gold", "--method calm"])
def test_a_method_says_how_many_questions_it_can_use_and_ends_without_one(world, tmp_path, how):
    """Those whose right answer is known; with CALM, those on which the languages disagree."""
    lines, path = read(world, "q.jsonl"), tmp_path / "q.jsonl"
    more = ("--data", f"jsonl:{path}", *how.split())
    for line in lines[:4]:
        del line["gold"]
    path.write_text("\n".join(map(json.dumps, lines)))
    part, _ = data.split(data.load(f"jsonl:{path}", LANGS), 7, None, 0)
    known = sum(question.gold is not None for question in part)
    if "calm" not in how:
        assert f"{known} of 7 questions to train on" in train(world, tmp_path / "some", *more)
        assert len(read(tmp_path / "some", "log.jsonl")) == math.ceil(known / 3) < 3
    for line in lines:
        same = {part: dict.fromkeys(LANGS, line[part]["en"]) for part in ("prompts", "answers")}
        line.update(same, gold=None)
    path.write_text("\n".join(map(json.dumps, lines)))
    text = train(world, tmp_path / "none", *more, fails=True)
    assert "error: --method" in text and "no question to train on" in text
    assert not (tmp_path / "none" / "model.safetensors").exists()


def test_dpo_then_dco_by_subject_stand_in_one_table_with_what_their_metrics_say(world, tmp_path):
    """Trained on one subject, reported on two, the second run from the first; then Table 1."""
    more = ["--train_subjects", "odd", "--train_questions", 3, "--test_subjects", "even", "odd"]
    first, second = tmp_path / "first", tmp_path / "second"
    train(world, first, *more, "--method", "dpo")
    train(world, second, *more, "--model", first, "--pairs", "gold")
    subjects = Counter((x["split"], x["subject"]) for x in read(second, "answers.jsonl"))
    assert subjects == {("train", "odd"): 3, ("test", "even"): 6, ("test", "odd"): 2}
    began = 100 * read(first, "metrics.json")["test"]["base"]["clc"][0]
    ended = 100 * read(second, "metrics.json")["test"]["trained"]["clc"][0]
    table = launch("rankc.py", second, "--base", first).splitlines()
    header, _, row = ([cell.strip() for cell in x.split("|")] for x in table if x[:1] == "|")
    cells = dict(zip(header, row, strict=True))
    assert cells["CLC"].split()[0] == f"{began:.1f}"
    assert cells["Δ CLC"].split()[0] == f"{ended - began:+.1f}"


# ------------------------------------------------------------------------- how the work is divided

DIVISIONS = [(0, "--max_tokens", 1), (0, "--gradient_checkpointing"), (1, "--shard"), (2,)]
DIVISIONS += [(3, "--max_tokens", 100), (2, "--shard", "--max_tokens", 60)]
DIVISIONS += [(3, "--shard", "--gradient_checkpointing")]


@pytest.mark.parametrize("processes, more", [(how[0], how[1:]) for how in DIVISIONS])
def test_any_division_trains_what_one_process_trains(world, alone, tmp_path, processes, more):
    """Uneven shares included: 9 rows in a step, 3 in the last."""
    out = tmp_path / "out"
    train(world, out, *more, processes=processes)
    assert_same(out, alone[0])
    for name in ("config.json", "generation_config.json", "tokenizer.json"):  # the same folder too
        assert (out / name).read_text() == (alone[0] / name).read_text()
    assert read(out, "metrics.json")["tokens"] == read(alone[0], "metrics.json")["tokens"]


def test_a_process_without_a_row_does_not_disturb_the_others(world, tmp_path):
    """The last step has two rows for three processes."""
    for name, processes in (("one", 0), ("three", 3)):
        train(world, tmp_path / name, "--langs", "en", "es", processes=processes)
    assert_same(tmp_path / "one", tmp_path / "three")


def test_a_sharded_model_with_tied_embeddings_is_saved_as_a_whole_one_is(world, tmp_path):
    """Its head once, as the embeddings."""
    shutil.copytree(world / "model", tmp_path / "model")
    vocabulary = len(weights(world / "model")["lm_head.weight"])
    tiny_llama(vocabulary, tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    more = ("--model", tmp_path / "model", "--epochs", 2)
    train(world, tmp_path / "whole", *more)
    train(world, tmp_path / "shards", *more, "--shard", processes=2)
    assert "lm_head.weight" not in weights(tmp_path / "shards")
    assert_same(tmp_path / "shards", tmp_path / "whole", atol=1e-4)


def test_each_epoch_takes_every_draw_once_in_an_order_of_its_own():
    config = settings(epochs=2, pairs_per_question=3, batch_questions=4)
    steps = program.training_order(5, config)
    assert [len(step) for step in steps] == [4, 4, 4, 3] * 2
    epochs = [sum(steps[:4], []), sum(steps[4:], [])]
    for draws in epochs:
        assert sorted(draws) == [(q, n) for q in range(5) for n in range(3)]
    assert epochs[0] != epochs[1] and steps == program.training_order(5, config)
    assert steps != program.training_order(5, replace(config, seed=1))


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_steps_bring_the_policy_to_the_optimal_one(process_group, tmp_path, beta):
    """Lemma 2 on a network: trained on two questions, its log-odds are those of pi* (Eq. 10)."""
    langs, answers = LANGS[:2], [[5, 6], [7], [8, 9]]
    trees = [[data.Tree([q + 1, lang + 3], answers) for lang in (0, 1)] for q in (10, 20)]
    questions = [made_up(str(q), 3, langs) for q in (0, 1)]
    more = {"beta": beta, "trust": ["en=2"], "candidates": 0, "epochs": 200, "lr": 3e-3}
    config = settings(langs=langs, out=str(tmp_path), save_every=0, **more)
    model, gamma = tiny_llama(100), program.gamma_matrix(config)
    program.place(model, config)
    reference = program.score(model, questions, trees, config)
    log = list(program.train(model, questions, trees, reference, gamma, config))
    wanted = dco.optimal_policy(reference.double(), gamma, beta)
    reached = program.score(model, questions, trees, config).double().log_softmax(-1)
    torch.testing.assert_close(reached, wanted, rtol=0, atol=0.2)
    assert (reference.double().log_softmax(-1) - wanted).abs().max() > 2  # there was a way to go
    assert len(log) == 200 and log[-1]["consistent"] == 1


def test_a_tied_embedding_trains_as_if_its_gradient_were_dense(process_group, tmp_path):
    langs, taught = LANGS[:2], []
    config = settings(langs=langs, lr=1e-2, max_tokens=9, out=str(tmp_path), save_every=0)
    trees = [[data.Tree([q + 1, 3], [[5, 6], [7]])] * 2 for q in range(4)]
    questions = [made_up(str(q), 2, langs) for q in range(4)]
    reference, gamma = torch.randn(4, 2, 2), program.gamma_matrix(config)
    for sparse in (True, False):
        model = tiny_llama(100, tie_word_embeddings=True)
        program.place(model, config)
        assert model.get_input_embeddings().sparse
        model.get_input_embeddings().sparse = sparse
        list(program.train(model, questions, trees, reference, gamma, config))
        taught.append(model.state_dict())
    for name, weight in taught[0].items():
        torch.testing.assert_close(weight, taught[1][name])


def test_without_clipping_a_step_is_as_with_a_bound_that_nothing_reaches(world, alone, tmp_path):
    norms = [line["grad_norm"] for line in read(alone[0], "log.jsonl")]
    assert min(norms) > 1  # else clipping to 1 would do nothing
    for name, bound in (("none", 0), ("high", 1e9)):
        train(world, tmp_path / name, "--grad_clip", bound, "--epochs", 2)
    ours, theirs = weights(tmp_path / "none"), weights(tmp_path / "high")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    moved = ours["lm_head.weight"] - weights(world / "model")["lm_head.weight"]
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize("more", [(), ("--shard",)])
def test_a_weight_without_a_gradient_keeps_its_value(world, alone, tmp_path, monkeypatch, more):
    """In steps and checkpoints; as an expert that no token is sent to."""
    load, save, saved = program.load_model, program.save_checkpoint, []

    def with_unused(config):
        model, tokenizer = load(config)
        model.model.unused = torch.nn.Parameter(torch.arange(3.0))
        return model, tokenizer

    monkeypatch.setattr(program, "load_model", with_unused)
    monkeypatch.setattr(program, "save_checkpoint", lambda *a: saved.append(a[-1]) or save(*a))
    train(world, tmp_path, *more, "--save_every", 2)
    ours, theirs = weights(tmp_path), weights(alone[0])
    assert ours.pop("model.unused").tolist() == [0, 1, 2] and 2 in saved
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-4, atol=2e-5)


def test_the_forecast_is_the_accuracy_of_the_consensus_that_each_trust_gives():
    g = torch.Generator().manual_seed(0)
    ref = torch.randn(60, 3, 4, generator=g).mul(3).log_softmax(-1).double()
    questions = [made_up(str(q), 4, LANGS, gold=None if q % 10 == 0 else q % 4) for q in range(60)]
    known = [q for q in range(60) if q % 10]
    text = program.forecast("train", ref, questions, settings(langs=LANGS, beta=0.7))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert rows[0] == ["forecast, train", *LANGS]

    def accuracy(scores):  # (Q, K), in per cent
        return f"{100 * sum(int(scores[q].argmax()) == q % 4 for q in known) / len(known):.1f}"

    assert rows[2] == ["base", *(accuracy(ref[:, i]) for i in range(3))]
    for row, weight in zip(rows[3:], (1, 2, 3, 5, 10), strict=True):
        consensus = weight * ref[:, 0] + ref[:, 1] + ref[:, 2]  # English is the reference language
        assert row == [f"pi*, --trust en={weight}", *[accuracy(consensus)] * 3]


def test_eval_only_judges_a_model_on_held_out_questions_alone(world, alone, tmp_path):
    out, judged = alone[0], tmp_path / "judged"
    text = train(world, judged, "--eval_only", "--model", out, processes=2)
    ours, theirs = read(out, "metrics.json"), read(judged, "metrics.json")
    assert list(theirs) == ["languages", "test", "seconds"] and "trained" not in theirs["test"]
    for name in ("clc", "clc_en", "top1_agreement", "accuracy/en", "accuracy/es", "probability/fr"):
        trained = ours["test"]["trained"][name]
        assert theirs["test"]["base"][name] == pytest.approx(trained, rel=1e-4), name
    assert "| forecast, test" in text
    assert not {"log.jsonl", "model.safetensors", "clc.png"} & {x.name for x in judged.iterdir()}
    named = ("--data", f"jsonl:{world / 'q.jsonl'}", "--langs", "fr", "en", "--device", "cpu")
    launch("train.py", "--eval_only", "--model", out, *named, "--out", tmp_path / "all")
    theirs = read(tmp_path / "all", "metrics.json")  # of all questions: none are to train on
    assert theirs["languages"] == ["fr", "en"] and theirs["test"]["questions"] == 11


# ------------------------------------------------------------------------------------- settings

BAD = [
    ("--nonsense 1", "unrecognized arguments: --nonsense"),
    ("--candidates ten", "argument --candidates: invalid int value"),
    ("--method ppo", "argument --method: invalid choice"),
    ("--langs en,es", "--langs: name two or more"),
    ("--langs en xx", "'xx'"),
    ("--langs en es en", "name each language once"),
    ("--method calm --langs en es", "calm three"),
    ("--candidates 1", "--candidates 1: Eq. 11 compares two or more"),
    ("--lr 0", "must be positive"),
    ("--trust en=0", "must be positive"),
    ("--trust sw=1", "--trust takes LANG=NUMBER"),
    ("--trust en=2 en=3", "--trust takes LANG=NUMBER"),
    ("--trust en:2", "--trust takes LANG=NUMBER"),
    ("--trust en=two", "--trust takes LANG=NUMBER"),
    ("--gamma 1 2", "--gamma two numbers for two languages, or L x L"),
    ("--gamma 1 0 0 0 1 0 0 0 1", "gamma_ii must be 0"),
    ("--gamma 0 1 1 1 0 1 1 1 0 --trust en=2", "--trust and --gamma both"),
    ("--train_questions 12", "there are 11"),
    ("--train_questions 11", "then 0 others"),
    ("--train_questions 0", "--train_questions: how many"),
    ("--test_questions 5", "then 4 others"),
    ("--test_questions 0", "nothing to report on"),
    ("--train_subjects biology", "no subject 'biology'; there are even, odd"),
    ("--train_subjects odd --train_questions 5 --test_subjects odd", "then 0 others"),
    ("--data /some/place", "error: --data /some/place"),
    ("--data jsonl:/no/such.jsonl", "No such file"),
    ("--model=", "without --model there is atlas alone"),
    ("--model /no/such/model", "--model /no/such/model cannot be loaded"),
    ("--model some-org/some-model", "--model some-org/some-model cannot be loaded"),
    (f"--model {__file__}", "cannot be loaded"),
]
for name in ("epochs", "batch_questions", "pairs_per_question", "max_tokens"):
    BAD.append((f"--{name} 0", "1 at least"))
for name in ("candidates", "save_every", "eval_every", "grad_clip"):
    BAD.append((f"--{name} -1", "0 at least"))
if not torch.cuda.is_available():
    BAD.append(("--device cuda", "--device cuda: this torch sees no GPU"))


@pytest.mark.parametrize("arguments, message", BAD, ids=[arguments for arguments, _ in BAD])
def test_bad_settings_end_with_a_message_and_leave_nothing(world, tmp_path, arguments, message):
    text = train(world, tmp_path / "out", *arguments.split(), fails=True)
    assert "error: " in text and message in text and "Traceback" not in text
    assert not list(tmp_path.glob("out/*"))


def test_of_many_processes_the_first_alone_tells_of_bad_input(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--langs", "en"])
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit, match="2"):
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        assert capsys.readouterr().err.count("error: --langs") == (rank == "0")


PAPER = {"dco": (1e-5, 1), "sft": (5e-7, 1), "dpo": (5e-6, 0.1), "calm": (5e-6, 0.1)}


@pytest.mark.parametrize("method", PAPER)
def test_what_is_not_given_is_the_papers(method):
    config = settings(method=method, data="bmlama:DIR")
    assert (config.lr, config.beta) == PAPER[method] and not config.trust and not config.gamma
    assert (config.epochs, config.batch_questions) == (1, 4)  # Apps. G and H
    assert (config.candidates, config.pairs_per_question, config.train_questions) == (2, 1, 5000)
    config = settings(method=method, data="xcsqa:DIR")
    draws = 7 if method in ("dco", "dpo") else 1
    assert (config.pairs_per_question, config.train_questions) == (draws, 800)
    assert settings(data="mmmlu:DIR", train_subjects=["law"]).train_questions is None
    assert settings(data="jsonl:FILE").train_questions is None


def test_what_is_given_stays_also_with_the_embedded_model():
    given = {"lr": 1e-9, "epochs": 99, "batch_questions": 98, "candidates": 97, "beta": 9.0}
    given |= {"train_questions": 96, "pairs_per_question": 95, "max_tokens": 94}
    for model in ("", "m"):
        config = asdict(settings(model=model, **given))
        assert {name: config[name] for name in given} == given
    missing = [x.name for x in fields(program.Config) if asdict(settings(model=""))[x.name] is None]
    assert missing == ["test_questions"]  # all that are left


def state(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_says_so_refuses_other_settings_and_stays_as_it_is(world, alone):
    out, before = alone[0], state(alone[0])
    more = ("--max_tokens", 64, "--gradient_checkpointing", "--shard", "--eval_every", 1)
    for changed in ((), (*more, "--save_every", 1)):
        assert "finished" in train(world, out, *changed)
    text = train(world, out, "--lr", 2e-3, fails=True, processes=2)
    assert "error: --out" in text and "--lr was 0.001, now 0.002" in text
    assert state(out) == before


def test_settings_of_the_machine_may_differ_and_no_others(alone):
    out, before = alone[0], read(alone[0], "run.json")
    free = {"max_tokens", "device", "gradient_checkpointing", "shard", "save_every", "eval_every"}
    for name in before.keys() - {"out"}:
        value = before[name]
        others = {bool: lambda: not value, str: lambda: value + "x", list: lambda: [*value, "x"]}
        other = others.get(type(value), lambda: (value or 0) + 1)()
        config = program.Config(**{**before, name: other})
        if name in free:
            assert program.find_run(config) == (str(out), True)
        else:
            with pytest.raises(data.InputError, match=f"--{name} was .*, now "):
                program.find_run(config)


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(world, tmp_path):
    """The model's own, with a checkpoint of another program; any other; and a file."""
    folder = tmp_path / "model"
    shutil.copytree(world / "model", folder)
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "state.pt").write_text("of another program")
    before = state(tmp_path)
    for out in (folder, tmp_path, folder / "config.json"):
        text = train(world, out, "--model", folder, fails=True)
        assert f"error: --out {out} is not empty, and holds no run" in text
        assert state(tmp_path) == before


# -------------------------------------------------------------------------- `python train.py`


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """The folder in which `torchrun train.py` was given nothing, and what it printed."""
    folder = tmp_path_factory.mktemp("default")
    (folder / "runs" / "1").mkdir(parents=True)  # of an earlier run
    return folder, launch("train.py", torchrun=1, cwd=folder)


def test_the_default_run_makes_the_embedded_model_consistent_in_the_next_free_folder(default_run):
    """How much is a matter of the machine; that it gains, in all languages together, is not."""
    folder, text = default_run
    out = folder / "runs" / "2"
    assert "wrote runs/2" in text and (out / "model.safetensors").exists()
    assert not list((folder / "runs" / "1").iterdir())
    run = read(out, "run.json")
    assert (run["model"], run["data"], run["out"]) == ("", "atlas", "runs/2")
    metrics = read(out, "metrics.json")
    base = metrics["train"]["base"]
    assert base["accuracy/en"][0] > 0.98 > base["accuracy/sw"][0]  # it has learnt facts unevenly
    for split, errors in (("train", 3), ("test", 2)):
        change, error = metrics[split]["change"]["clc"]
        assert change > 0.01 and change > errors * error
    change = metrics["train"]["change"]
    assert change["accuracy/en"][0] >= -0.01
    assert sum(change[f"accuracy/{lang}"][0] for lang in metrics["languages"]) > 0
