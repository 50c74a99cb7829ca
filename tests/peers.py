"""Beside its peers, on the same questions: `python tests/peers.py --model DIR --data bmlama:DIR`.

In an environment of its own (`pip install -e . lm_eval trl`; pytest does not collect this file):

    scoring   log-probs of all candidates, from text: lm-evaluation-harness's HFLM against
              data.encode and train.score; each language apart
    step      optimizer steps of 4 questions, 2 languages and 2 answers, 16 sequences, the reference
              computed before: TRL's DPOTrainer against train.train

Each way runs in a process of its own, in turn with the other; medians (min - max) of the rounds.
"""

import argparse
import itertools
import multiprocessing
import os
import tempfile
import time
from importlib.metadata import version
from statistics import median

import torch

import bench  # puts the project on the path
import data
import train


def questions(given, number: int) -> list[data.Question]:
    every = [q for q in data.load(given.data, given.langs, lambda _: None) if q.gold is not None]
    return data.split(every, number, 0, 0)[0]


def settings(given) -> train.Config:
    """DPO for as many steps as all rounds take, without checkpoints."""
    names = {"model": given.model, "langs": given.langs, "dtype": given.dtype, "device": "cpu"}
    names |= {"epochs": given.rounds + 1, "save_every": 0, "out": os.devnull}
    return train.with_defaults(train.Config(**names, method="dpo"))


def scoring(pipe, given, way: str, lang: str) -> None:
    """Each turn scores all candidates of the questions in one language."""
    asked = questions(given, given.questions)
    config = settings(given)
    if way == "lm_eval":
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        dtype, rows = {"dtype": given.dtype, "device": "cpu"}, given.batch_size
        peer = HFLM(pretrained=given.model, batch_size=rows, **dtype)
        texts = [(q.prompts[lang], answer) for q in asked for answer in q.answers[lang]]
    else:
        train.init_distributed(config)
        model, tokenizer = train.load_model(config)
        train.place(model, config)
    for _ in iter(pipe.recv, None):
        begun = time.perf_counter()
        if way == "lm_eval":
            requests = [Instance("loglikelihood", {}, text, 0) for text in texts]
            scores = torch.tensor([x for x, _ in peer.loglikelihood(requests, disable_tqdm=True)])
        else:
            trees = data.encode(tokenizer, asked, [lang])
            scores = train.score(model, asked, trees, config)
            scores = scores[scores.isfinite()]
        pipe.send((len(scores) / (time.perf_counter() - begun), bench.room(), scores))


def step(pipe, given, way: str) -> None:
    """Each turn takes so many steps."""
    asked, config = questions(given, 4 * given.steps), settings(given)

    def turns():  # one item for each step; between turns it waits
        for _ in iter(pipe.recv, None):
            begun = time.perf_counter()
            yield from range(given.steps)
            pipe.send((given.steps / (time.perf_counter() - begun), bench.room(), None))

    if way == "trl":
        return trl_steps(given, asked, turns())
    train.init_distributed(config)
    model, tokenizer = train.load_model(config)
    trees, gamma = data.encode(tokenizer, asked, given.langs), train.gamma_matrix(config)
    train.place(model, config)
    ref = train.score(model, asked, trees, config)
    steps = train.train(model, asked, trees, ref, gamma, config)
    for _ in turns():
        next(steps)


def trl_steps(given, asked: list[data.Question], turns) -> None:
    """TRL's trainer on the same questions, each with its right answer and the first other one."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Turns(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = next(turns, None) is None

    pairs = []
    for question, lang in itertools.product(asked, given.langs):
        answers, gold = question.answers[lang], question.gold
        pair = {"prompt": question.prompts[lang], "chosen": answers[gold]}
        pairs.append(pair | {"rejected": answers[(gold + 1) % len(answers)]})
    with tempfile.TemporaryDirectory() as folder:
        rows = {"per_device_train_batch_size": 4 * len(given.langs)}
        rows["precompute_ref_batch_size"] = rows["per_device_train_batch_size"]
        quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no"}
        quiet |= {"disable_tqdm": True, "use_cpu": True, "bf16": given.dtype == "bfloat16"}
        more = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
        settings = DPOConfig(folder, num_train_epochs=10**6, **rows, **quiet, **more)
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
        parts = {"train_dataset": Dataset.from_list(pairs), "processing_class": tokenizer}
        DPOTrainer(model, args=settings, callbacks=[Turns()], **parts).train()


def compare(given, title: str, unit: str, work, peer: str, *more) -> None:
    pipes = {way: bench.begin(work, given, way, *more) for way in (peer, "this program")}
    found = {way: [] for way in pipes}
    for _ in range(given.rounds + 1):
        for way, pipe in pipes.items():
            pipe.send("your turn")
            found[way].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(None)
    for process in multiprocessing.active_children():
        process.join()
    print(f"\n{title}")
    for way, turns in found.items():
        rates, room = [rate for rate, *_ in turns[1:]], turns[-1][1]  # the first warms up
        spread = f"{median(rates):.3g} {unit} ({min(rates):.3g} - {max(rates):.3g})"
        print(f"  {way:12} {spread}, {room / 2**30:.2f} GiB")
    theirs, ours = found.values()
    ratios = [a[0] / b[0] for a, b in zip(ours[1:], theirs[1:], strict=True)]
    told = f"{median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}) times as fast"
    told += f", {ours[-1][1] / theirs[-1][1]:.2f} of the memory"
    if ours[0][2] is not None:
        told += f", scores within {(ours[0][2] - theirs[0][2]).abs().max():.0e} nats"
    print(f"  {told}", flush=True)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--model", required=True, help="folder of a causal language model")
    add("--data", required=True, help="as train.py takes it")
    add("--langs", nargs=2, default=["en", "es"])
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--questions", type=int, default=100, help="to score")
    add("--steps", type=int, default=10, help="a turn")
    add("--rounds", type=int, default=3)
    add("--batch_size", type=int, default=16, help="of lm-evaluation-harness")
    add("--only", choices=["scoring", "step"], help="leave the other out")
    given = parser.parse_args()
    peers = ", ".join(f"{name} {version(name)}" for name in ("lm_eval", "trl", "torch"))
    print(f"{given.model}, {given.dtype}, {torch.get_num_threads()} threads; {peers}", flush=True)
    if given.only != "step":
        for lang in given.langs:
            title = f"scoring {given.questions} questions, {lang}"
            compare(given, title, "candidates/s", scoring, "lm_eval", lang)
    if given.only != "scoring":
        compare(given, "training, 16 sequences a step", "steps/s", step, "trl")


if __name__ == "__main__":
    main()
