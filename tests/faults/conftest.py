"""What can happen to a run, each in a process of its own that runs the real command.

`zygote.py` forks the processes, `injections.py` brings the faults about in them, `runs.py` looks at what they leave.
Fault, and the tests of it:

kill -9 and power loss at every stage of a save            test_kill (stage, power_loss)
kill -9 at any moment                                      test_kill (random), test_signals (as_a_user_starts_it)
exact resume: at a step, at the end of an epoch, inside a  test_kill (resume, accumulation), test_streams (kill, resume)
  step, with packing, streams and their threads
another micro-batch                                        test_determinism (one_batch_of_8), test_memory
SIGTERM, SIGINT, SIGUSR1, SIGSTOP and SIGCONT              test_signals
NaN and infinity in loss, gradient, thought                test_non_finite
bit flip, truncation, emptied, missing or additional file  test_damage
full disk, for checkpoints, metrics and messages           test_full_disk
missing optimizer or state                                 test_damage (missing), test_streams (its_place)
other options, text, tokenizer or vocabulary               test_one_run, test_streams (other_shards)
bad rows                                                   test_streams (bad, skip)
out of memory                                              test_memory
saves behind training                                      test_saving_behind
retention; links and paths that lead elsewhere             test_outside (stay, elsewhere, index, manifest)
code and pickles                                           test_outside (code, pickle)
what cannot be written; loggers and reports that fail      test_full_disk (cannot, read_only), test_bystanders
determinism; what is recomputed                            test_determinism
two runs in one directory                                  test_one_run (process)
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quietstar.demos.textbook import character_tokenizer
from tests.faults.launch import REPOSITORY, Zygote
from tests.faults.runs import Runs, arguments
from tests.faults.shards import write_shards


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/`, and `text.jsonl` with documents of unequal length."""
    directory = tmp_path_factory.mktemp("inputs")
    make_model(directory / "model")
    character_tokenizer().save_pretrained(directory / "model")
    rng = random.Random(0)
    with (directory / "text.jsonl").open("w") as file:
        for _ in range(16):
            text = "".join(rng.choice("0123456+=,\n") for _ in range(rng.randint(8, 24)))
            file.write(json.dumps({"text": f"1{text}"}) + "\n")
    return directory


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_shards`."""
    return write_shards(tmp_path_factory.mktemp("shards"))


def make_model(directory: Path) -> None:
    """A Llama with one layer of 16; the same weights every time."""
    config = LlamaConfig(
        vocab_size=14,  # one more than the tokenizer has
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)


@pytest.fixture(scope="session")
def runs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Runs on these inputs."""
    directory = tmp_path_factory.mktemp("runs")
    path = [str(REPOSITORY), str(REPOSITORY / "kernels"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    zygote = Zygote(directory, environment, arguments(inputs, directory / "first"))
    yield Runs(zygote, inputs, directory)
    zygote.close()
