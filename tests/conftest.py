"""Shared by the tests: hypothesis profiles, where the real data lies, tiny models and tokens."""

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

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the network
torch.set_num_threads(1)  # as fast for tiny models, and rounds alike on every machine

settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


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


def tiny_tokenizer(text: str):
    """Byte-pair tokens learnt from `text`: words split and boundaries move, as in real ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core)


def tiny_llama(vocab_size: int, seed: int = 0, **changes):
    """A two-layer Llama with weights large enough that its answers differ clearly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": vocab_size,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128,
                "initializer_range": 0.2,
                "bos_token_id": None,
                "eos_token_id": None,
                **changes,
            }
        )
    ).eval()


WORDS = "one two three four five six seven eight nine ten".split()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a tiny model and 11 questions in three languages, one with fewer answers."""
    folder = tmp_path_factory.mktemp("world")
    lines = []
    for i, word in enumerate(WORDS + ["eleven"]):
        prompts = {
            "en": f"The number after {word} is",
            "es": f"Tras {word} viene el",
            "fr": f"Le suivant de {word} est",
        }
        answers = [f" {WORDS[(i * 3 + k) % 10]}" for k in range(3 if i == 4 else 4)]
        lines.append(
            json.dumps(
                {
                    "id": str(i),
                    "subject": ["even", "odd"][i % 2],
                    "gold": i % 3,
                    "prompts": prompts,
                    "answers": {
                        lang: [a + lang[0] * (k % 2) for k, a in enumerate(answers)]
                        for lang in prompts
                    },
                }
            )
        )
    (folder / "q.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = tiny_tokenizer("\n".join(lines))
    tokenizer.save_pretrained(folder / "model")
    tiny_llama(len(tokenizer)).save_pretrained(folder / "model")
    return folder


def launch(script, *arguments, processes=0, torchrun=0, fails=False, cwd=ROOT):
    """Run a script inside this process, as so many processes, or under torchrun; its output."""
    arguments = [str(argument) for argument in arguments]
    if torchrun:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = subprocess.run(
            [*start, "--nproc_per_node", str(torchrun), ROOT / script, *arguments],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        statuses, text = [done.returncode], done.stdout + done.stderr
    elif processes:
        statuses, text = wait(fork(script, arguments, processes))
    else:
        status, text = inside(script, arguments)
        statuses = [status]
    assert any(statuses) == bool(fails), text
    return text


def inside(script, arguments):
    text, before = io.StringIO(), sys.argv
    sys.argv, status = [script, *arguments], 0
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            run(script)
        except SystemExit as ended:
            status = ended.code
        except Exception:
            status = 1
            traceback.print_exc()
        finally:
            sys.argv = before
    return status, text.getvalue()


def run(script):
    """What a script does where it is the program."""
    import torch.distributed as dist

    import data
    import rankc
    import train

    try:
        rankc.main() if script == "rankc.py" else train.main()
    except data.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def fork(script, arguments, processes=1, before=None, **environment):
    """Start processes as torchrun would, but forked from one that has imported everything.

    `before` is called in each of them first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["train", "transformers.models.llama.modeling_llama", "matplotlib.backends.backend_agg"]
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    arguments = [str(argument) for argument in arguments]
    for rank in range(processes):
        output = tempfile.NamedTemporaryFile("r", prefix=f"rank-{rank}-", delete=False)
        there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
        there |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, **environment}
        args = (script, arguments, there, output.name, before)
        process = context.Process(target=child, args=args, daemon=True)
        process.start()
        started.append((process, output))
    return started


def child(script, arguments, there, output, before):
    os.environ.update({name: str(value) for name, value in there.items()})
    file = os.open(output, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    if before:
        before()
    run(script)


def wait(started, timeout=240):
    """The exit statuses and what was written; nothing may hang."""
    until = time.monotonic() + timeout
    for process, _ in started:
        process.join(max(0, until - time.monotonic()))
    hung = [process.kill() for process, _ in started if process.exitcode is None]
    text = ""
    for _, output in started:
        text += output.read()
        output.close()
        os.unlink(output.name)
    assert not hung, f"{len(hung)} processes hung\n{text}"
    return [process.exitcode for process, _ in started], text


def command(world, out, *more):
    """The arguments of a run on the tiny model and its questions."""
    settings = {
        "--model": world / "model",
        "--data": f"jsonl:{world / 'q.jsonl'}",
        "--train_questions": 7,
        "--lr": 1e-3,
        "--batch_questions": 3,
        "--device": "cpu",
        "--out": out,
    }
    fixed = [str(part) for setting in settings.items() for part in setting]
    return [*fixed, "--langs", "en", "es", "fr", *map(str, more)]


def train(world, out, *more, **how):
    return launch("train.py", *command(world, out, *more), **how)


def weights(out):
    return load_file(out / "model.safetensors")


def assert_same(a, b, rtol=1e-4, atol=2e-5):
    """Within the rounding that Adam, which divides by the gradient's size, makes of 3e-3 moved."""
    assert weights(a).keys() == weights(b).keys()
    for name, value in weights(a).items():
        torch.testing.assert_close(value, weights(b)[name], rtol=rtol, atol=atol)
    logs = [[json.loads(line) for line in (out / "log.jsonl").open()] for out in (a, b)]
    for ours, theirs in zip(*logs, strict=True):  # Adam and clipping hide the gradient's scale
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)
    ours, theirs = (json.loads((out / "metrics.json").read_text()) for out in (a, b))
    for split in ("train", "test"):
        assert ours[split]["trained"]["clc"] == pytest.approx(theirs[split]["trained"]["clc"])
        for name in ("clc", "accuracy/en", "accuracy/es", "changed/es"):
            assert ours[split]["base"][name] == theirs[split]["base"][name]
        assert ours[split]["base"]["clc_matrix"] == theirs[split]["base"]["clc_matrix"]
