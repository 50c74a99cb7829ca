"""Shared by the tests: hypothesis profiles, tiny models and tokenizers, and runs of the program."""

import contextlib
import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the network
torch.set_num_threads(1)  # as fast for tiny models, and rounds alike on every machine

settings.register_profile("ci", deadline=None, print_blob=True)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

LANGS = ["en", "es", "fr"]
WORDS = "one two three four five six seven eight nine ten".split()


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data sets beside the project; its tests skip where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real data sets are not at {folder}")
    return folder


@pytest.fixture
def process_group():
    """A process group of one, in this process."""
    import torch.distributed as dist

    import train

    train.init_distributed(train.with_defaults(train.Config(model="m", device="cpu")))
    yield
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------ tiny things
def tiny_tokenizer(text: str):
    """Byte-pair tokens learnt from `text`: words split and boundaries move, as in real ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def tiny_llama(vocab_size: int, seed: int = 0, **changes):
    """A two-layer Llama with weights large enough that its answers differ clearly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes.update(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    others = {"initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(**{"vocab_size": vocab_size, **sizes, **others, **changes})
    ).eval()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a tiny model and 11 questions in three languages, one with fewer answers."""
    folder = tmp_path_factory.mktemp("world")
    lines = []
    for i, word in enumerate([*WORDS, "eleven"]):
        prompts = {
            "en": f"The number after {word} is",
            "es": f"Tras {word} viene el",
            "fr": f"Le suivant de {word} est",
        }
        answers = {}
        for lang in LANGS:
            answers[lang] = [f" {WORDS[(3 * i + k) % 10]}" for k in range(3 if i == 4 else 4)]
            answers[lang][1] += lang[0]  # so that it is not the same in all languages
        question = {"id": str(i), "subject": ["even", "odd"][i % 2], "gold": i % 3}
        lines.append(json.dumps({**question, "prompts": prompts, "answers": answers}))
    (folder / "q.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = tiny_tokenizer("\n".join(lines))
    tokenizer.save_pretrained(folder / "model")
    tiny_llama(len(tokenizer)).save_pretrained(folder / "model")
    return folder


# ---------------------------------------------------------------------------- running the program
def launch(script, *arguments, processes=0, torchrun=0, fails=False, cwd=ROOT):
    """Run a script in this process, as so many processes, or under torchrun; what it printed."""
    arguments = [str(argument) for argument in arguments]
    if torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(torchrun), str(ROOT / script), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=cwd, env=environment, timeout=600, **pipes)
        statuses, text = [done.returncode], done.stdout
    elif processes:
        statuses, text = wait(fork(script, arguments, processes))
    else:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            statuses = [run(script, arguments)]
        text = output.getvalue()
    assert all(statuses) if fails else not any(statuses), text
    return text


def run(script, arguments):
    """What `python SCRIPT ARGUMENTS` does, in this process; its exit status.

    It takes 0.4 s for a run on the tiny model, where a new Python takes 10 s to import everything.
    """
    import torch.distributed as dist

    import data
    import rankc
    import train

    main = {"train.py": train.main, "rankc.py": rankc.main}[script]
    with mock.patch.object(sys, "argv", [script, *arguments]):
        try:
            main()
        except data.InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except SystemExit as error:  # of argparse
            return error.code
        except Exception:
            traceback.print_exc()
            return 1
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return 0


def fork(script, arguments, processes=1, before=None, **environment):
    """Start processes as torchrun would; for `wait`. Each calls `before` first.

    They are forked from a process that has imported everything, which takes it 10 s, once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["train", "transformers.models.llama.modeling_llama", "matplotlib.backends.backend_agg"]
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": processes}
    arguments = [str(argument) for argument in arguments]
    started = []
    for rank in range(processes):
        output = tempfile.NamedTemporaryFile("r", prefix=f"rank-{rank}-", delete=False)
        variables = {**address, "RANK": rank, "LOCAL_RANK": rank, **environment}
        given = (script, arguments, variables, output.name, before)
        process = context.Process(target=forked, args=given, daemon=True)
        process.start()
        started.append((process, output))
    return started


def forked(script, arguments, variables, output, before):
    """What each process of `fork` does; its output goes into a file."""
    for name, value in variables.items():
        os.environ[name] = str(value)
    file = os.open(output, os.O_WRONLY)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    torch.set_num_threads(1)
    if before:
        before()
    sys.exit(run(script, arguments))


def wait(started, timeout=240):
    """The exit statuses of what `fork` started, and what it wrote; nothing may hang."""
    end = time.monotonic() + timeout
    text, hung = "", 0
    for process, output in started:
        process.join(max(0, end - time.monotonic()))
        if process.exitcode is None:
            hung += 1
            process.kill()
        text += output.read()
        output.close()
        os.unlink(output.name)
    assert not hung, f"{hung} processes hung\n{text}"
    return [process.exitcode for process, _ in started], text


def command(world, out, *more):
    """The arguments of a run on the tiny model and its questions."""
    arguments = ["--model", world / "model", "--data", f"jsonl:{world / 'q.jsonl'}"]
    arguments += ["--langs", *LANGS, "--train_questions", 7, "--batch_questions", 3, "--lr", 1e-3]
    return [str(argument) for argument in [*arguments, "--device", "cpu", "--out", out, *more]]


def train(world, out, *more, **how):
    """Run train.py on the tiny model and its questions; what it printed."""
    return launch("train.py", *command(world, out, *more), **how)


# -------------------------------------------------------------------------------- what a run leaves
def read(out, name):
    """A file of a run: .json as it is, .jsonl as the list of its lines."""
    text = (out / name).read_text()
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def weights(out):
    return load_file(out / "model.safetensors")


def assert_same(a, b, rtol=1e-4, atol=2e-5):
    """Within the rounding that Adam, which divides by the gradient's size, makes of 3e-3 moved."""
    assert weights(a).keys() == weights(b).keys()
    for name, weight in weights(a).items():
        torch.testing.assert_close(weight, weights(b)[name], rtol=rtol, atol=atol)
    # Adam and clipping hide the gradient's scale; the log shows it.
    for line, other in zip(read(a, "log.jsonl"), read(b, "log.jsonl"), strict=True):
        for name in ("loss", "grad_norm"):
            assert line[name] == pytest.approx(other[name], rel=1e-3)
    metrics, other = read(a, "metrics.json"), read(b, "metrics.json")
    for split in ("train", "test"):
        clc = other[split]["trained"]["clc"]
        assert metrics[split]["trained"]["clc"] == pytest.approx(clc)
        for name in ("clc", "accuracy/en", "accuracy/es", "changed/es", "clc_matrix"):
            assert metrics[split]["base"][name] == other[split]["base"][name]
