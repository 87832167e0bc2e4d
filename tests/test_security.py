"""Promises of SECURITY.md that hold for the whole program rather than for one room."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quietstar
from quietstar import QuietStarForCausalLM, evaluate, gate, generate, plan, rank, star, train, view, vstar
from quietstar.config.loops import GeneratorOptions, ProblemOptions
from quietstar.config.training import DataOptions, FinetuningOptions
from quietstar.data.loading import load_batches
from quietstar.data.tokenizer import load_tokenizer
from quietstar.errors import CheckpointError, QuietStarError
from quietstar.inference.loading import load_thinking
from quietstar.model.adapters import add_adapters
from quietstar.model.loading import load_causal_lm
from quietstar.runs.checkpoints import describe
from quietstar.tasks import load_task
from quietstar.verifiers.dpo import train_dpo
from quietstar.verifiers.pairs import make_pairs
from quietstar.verifiers.verifier import Verifier
from tests.verifiers.tiny import labelled, options, training, write_model

SOURCES = sorted(Path(quietstar.__file__).parent.rglob("*.py"))
PICKLES = (
    "pytorch_model.bin",
    "pytorch_model-00001-of-00001.bin",
    "model.pt",
    "adapter_model.bin",
    "training_args.bin",
)
PICKLES += ("optimizer.pt", "scheduler.pt", "rng_state.pth", "vocab.pkl", "tokenizer.pkl", "consolidated.00.pth")


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._marker,)


def plain(directory: Path) -> None:
    write_model(directory)


def thinking(directory: Path) -> None:
    _thinking(directory).save_pretrained(directory)


def adapters(directory: Path) -> None:
    model = _thinking(directory)
    add_adapters(model, 2, 4)
    for file in directory.glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(directory)
    write_model(directory.with_name("base"))


def _thinking(directory: Path) -> QuietStarForCausalLM:
    base = write_model(directory.with_name("base"))
    load_tokenizer(base).save_pretrained(directory)
    sizes = {"thought_length": 2, "lookahead": 1}
    return QuietStarForCausalLM.from_base(str(base), start_text=[3], end_text=[4], **sizes)


def verifier(directory: Path) -> None:
    base, out = write_model(directory.with_name("base")), directory.with_name("trained")
    trained = train_dpo(
        GeneratorOptions(path=str(base)),
        make_pairs(labelled(), 3, 0),
        options(),
        training(),
        FinetuningOptions(),
        out,
    )
    shutil.copytree(trained, directory)


def generates(path: Path) -> None:
    model, tokenizer = load_thinking(path, device="cpu")
    tokens = torch.tensor([tokenizer("1+1=")["input_ids"]])
    model.generate(tokens, max_new_tokens=2)


def scores(path: Path) -> None:
    Verifier(path, device="cpu").score("1+1=", ["2"])


LOADERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "plain": (plain, load_causal_lm),
    "plain, to think": (plain, lambda path: QuietStarForCausalLM.from_base(path, start_text=[3], end_text=[4])),
    "plain, to score": (plain, scores),
    "tokenizer": (plain, load_tokenizer),
    "thinking": (thinking, generates),
    "thinking, as transformers does": (thinking, QuietStarForCausalLM.from_pretrained),
    "adapters": (adapters, generates),
    "verifier": (verifier, scores),
}


def trap(directory: Path, marker: Path) -> None:
    """Puts a pickle and code wherever one could be looked for."""
    for name in PICKLES:
        (directory / name).write_bytes(pickle.dumps(Touch(marker)))
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    for name in ("own.py", "modeling_own.py", "custom_generate/generate.py", "__init__.py", "chat.py"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(code)
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor")
    entries = {"auto_map": dict.fromkeys(kinds, "own.Own"), "custom_generate": "own.py", "trust_remote_code": True}
    entries["auto_map"]["AutoTokenizer"] = ["own.Own", "own.Own"]  # type: ignore[index]
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json"):
        file = directory / name
        if file.is_file():
            file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize("kind", LOADERS)
def test_no_pickle_is_read_and_no_code_is_run(kind: str, tmp_path: Path) -> None:
    """`QuietStarForCausalLM.from_pretrained` read `pytorch_model.bin` where there were no safetensors."""
    make, load = LOADERS[kind]
    directory, marker = tmp_path / "directory", tmp_path / "executed"
    make(directory)
    trap(directory, marker)
    load(directory)
    assert not marker.exists()
    for file in [*directory.glob("*.safetensors"), *directory.glob("tokenizer.json")]:
        file.unlink()  # only what is trapped is left
    with pytest.raises((QuietStarError, OSError)):
        load(directory)
    assert not marker.exists()
    pickle.loads((directory / PICKLES[0]).read_bytes())
    assert marker.exists()  # the trap works


COMMANDS = {one.__name__: one for one in (train, star, vstar, generate, evaluate, view, gate, rank, plan)}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("option", ["--trust_remote_code", "--model.trust_remote_code", "--custom_generate"])
def test_there_is_no_option_for_code_of_others(name: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    command: Any = COMMANDS[name]
    try:
        status = command.main([option, "true"])
    except SystemExit as end:
        status = end.code
    assert status == 2 and option.lstrip("-") in capsys.readouterr().err


def test_every_loader_of_transformers_is_told_not_to_run_code() -> None:
    found = 0
    for file in SOURCES:
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            told = {keyword.arg: keyword.value for keyword in call.keywords}
            if isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained":
                owner = call.func.value
                if isinstance(owner, ast.Name) and owner.id.startswith("Auto"):
                    assert "trust_remote_code" in told or None in told, f"{file}:{call.lineno}"
            if "trust_remote_code" in told:
                found += 1
                assert isinstance(value := told["trust_remote_code"], ast.Constant) and value.value is False
            assert not {"weights_only", "allow_pickle", "custom_generate"} & set(told), f"{file}:{call.lineno}"
    assert found >= 3


OFFLINE: dict[str, Callable[[], Any]] = {
    "a model": lambda: load_causal_lm("someone/model"),
    "a tokenizer": lambda: load_tokenizer("someone/model"),
    "a thinking model": lambda: load_thinking("someone/model", device="cpu"),
    "a base": lambda: QuietStarForCausalLM.from_base("someone/model", start_text=[3], end_text=[4]),
    "a verifier": lambda: Verifier("someone/model", device="cpu"),
    "a stream": lambda: stream("stream", "someone/texts"),
    "openwebmath": lambda: stream("openwebmath", ""),
    "c4": lambda: stream("c4", ""),
    "gsm8k": lambda: load_task("gsm8k", ProblemOptions()).problems("train"),
    "math": lambda: load_task("math", ProblemOptions()).problems("test"),
}


def stream(source: Any, path: str) -> Any:
    tokenizer: Any = None
    given = {"path": path} if path else {}
    return load_batches(
        DataOptions(source=source, length=4, **given), tokenizer, batch_size=1, seed=0, held_out_texts=0
    )


def forbid_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    asked: list[Any] = []

    def network(*what: Any, **_: Any) -> Any:
        asked.append(what)
        raise OSError("the network was used")

    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, network)
    monkeypatch.setattr(socket.socket, "connect", network)
    return asked


@pytest.mark.parametrize("what", OFFLINE)
def test_offline_nothing_is_asked_of_the_network(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = forbid_network(monkeypatch)
    with pytest.raises(QuietStarError):
        OFFLINE[what]()
    assert asked == []


def test_directories_and_files_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Online, as far as the libraries know."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    asked = forbid_network(monkeypatch)
    with pytest.raises(OSError):
        urllib.request.urlopen("http://localhost:1")
    assert asked  # it would be seen
    asked.clear()
    base, text = write_model(tmp_path / "base"), tmp_path / "text.txt"
    text.write_text("1+1=2\n" * 200)
    fixed = (
        "--model.thought_length 2 --model.lookahead 1 --model.start_text = --model.end_text = --data.length 16 "
        "--training.steps 1 --training.batch_size 2 --training.threads 1 --training.device cpu"
    )
    run = ["--model.path", str(base), "--data.path", str(text), "--output_dir", str(tmp_path / "run")]
    assert train.main([*run, *fixed.split()]) == 0
    generates(tmp_path / "run")
    assert asked == []


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    verifier(tmp_path / "verifier")
    return tmp_path / "verifier"


@pytest.mark.parametrize("change", ["bit", "cut", "empty", "gone", "other"])
def test_hashes_of_a_verifier_show_damage(change: str, scored: Path) -> None:
    file = scored / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    damaged = {"bit": bytes(content), "cut": file.read_bytes()[:-8], "empty": b"", "other": b"x" * len(content)}
    if change == "gone":
        file.unlink()
    else:
        file.write_bytes(damaged[change])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (missing|its content has changed)"):
        Verifier(scored, device="cpu")


def test_hashes_do_not_show_malice(scored: Path) -> None:
    """They lie beside the weights: who changes both is not noticed, and SECURITY.md says so."""
    before = Verifier(scored, device="cpu").score("1+1=", ["2"])
    weights = load_file(scored / "model.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in weights.items()}, scored / "model.safetensors", {"format": "pt"})
    description = json.loads((scored / "verifier.json").read_text())
    description["files"] = {file.name: describe(file) for file in scored.glob("*.safetensors")}
    (scored / "verifier.json").write_text(json.dumps(description))
    assert Verifier(scored, device="cpu").score("1+1=", ["2"]) != before
