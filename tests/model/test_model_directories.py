"""Directories of models from others: what leads out of them, and what cannot be a model, is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from quietstar.data.tokenizer import load_tokenizer
from quietstar.errors import CheckpointError, ConfigError
from quietstar.model.adapters import OPTIONS, add_adapters
from quietstar.model.loading import load_causal_lm
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.runs.directory import check_model_directory, culprit
from tests.model.tiny import make_base, make_model

INDEX = "model.safetensors.index.json"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    make_base("llama").save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", "model.bin", 3, None, "gone.safetensors"]
)
def test_an_index_names_files_of_its_directory(plain: Path, name: Any) -> None:
    """`../x.safetensors` was followed."""
    shutil.copy(plain / "model.safetensors", plain.parent / "x.safetensors")
    names = load_file(plain / "model.safetensors")
    (plain / "model.safetensors").unlink()
    (plain / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))
    with pytest.raises(CheckpointError, match=r"weight_map|missing"):
        load_causal_lm(plain)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.pkl", "model.bin", "config.json"])
def test_an_index_names_no_file_that_is_not_safetensors(plain: Path, name: str) -> None:
    names = load_file(plain / "model.safetensors")
    if name != "config.json":
        shutil.move(plain / "model.safetensors", plain / name)
    (plain / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)}))
    with pytest.raises(CheckpointError, match=r"weight_map: .*needs the name of a \.safetensors file"):
        load_causal_lm(plain)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_links_are_followed_in_the_cache_of_the_hub_alone(plain: Path, name: str) -> None:
    shutil.move(plain / name, plain.parent / "elsewhere")
    (plain / name).symlink_to(plain.parent / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{name}: is a link out"):
        load_causal_lm(plain)
    cache = plain.parent / "models--x"
    (cache / "blobs").mkdir(parents=True)
    shutil.move(plain.parent / "elsewhere", cache / "blobs" / "hash")
    (plain / name).unlink()
    (plain / name).symlink_to("../../blobs/hash")
    (cache / "snapshots").mkdir()
    shutil.move(plain, cache / "snapshots" / "revision")
    load_causal_lm(cache / "snapshots" / "revision")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("hidden_size", value) for value in (-32, 0, "32", None, 32.0, True, [32])),
        *(("num_hidden_layers", value) for value in (-1, None, {})),
        *(("num_attention_heads", value) for value in (3, 0)),
        *(("num_key_value_heads", value) for value in (3, -1)),
        *(("vocab_size", value) for value in (-40, "40")),
        *(("model_type", value) for value in (None, 3, "")),
    ],
)
def test_a_field_of_the_configuration_is_named(plain: Path, field: str, value: Any) -> None:
    config = json.loads((plain / "config.json").read_text()) | {"head_dim": None, field: value}
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"config\.json: {field}: got "):
        load_causal_lm(plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
def test_the_tensor_that_is_not_finite_is_named(plain: Path, name: str, value: float) -> None:
    """NaN weights were blamed on attention."""
    tensors = load_file(plain / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} has values"):
        QuietStarForCausalLM.from_base(plain, start_text=[5], end_text=[5])
    base = make_base("llama")
    with torch.no_grad():
        base.get_parameter(name).view(-1).fill_(value)
    with pytest.raises(CheckpointError, match=f"{name}: has values"):
        QuietStarForCausalLM.from_base(base, start_text=[5], end_text=[5])


LOADS = """
import sys
from quietstar import QuietStarForCausalLM
from quietstar.errors import QuietStarError
for directory in sys.argv[1:]:
    try:
        QuietStarForCausalLM.from_pretrained(directory)
    except (OSError, QuietStarError) as error:
        print(error)
"""


class Hub(BaseHTTPRequestHandler):
    """A hub that has nothing, and keeps what it was asked for."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_base_that_adapters_name_is_not_asked_of_the_hub(tmp_path: Path, hub: str) -> None:
    """The tests run offline, where nothing is asked anyway: a process of its own is not, and has a hub beside it.

    The hub's library asks it for one thing or another as soon as it gets a hub name, even where it may use local files
    only.
    """
    model = make_model("llama")
    add_adapters(model, 2, 4)
    names = ["someone/else", "gpt2", "a/b-c", "org/model.v2", "x"]
    for index, name in enumerate(names):
        model.save_pretrained(tmp_path / str(index))
        options = json.loads((tmp_path / str(index) / OPTIONS).read_text())
        (tmp_path / str(index) / OPTIONS).write_text(json.dumps(options | {"base_model_name_or_path": name}))
    without = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
    environment = {key: value for key, value in os.environ.items() if key not in without}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}

    def said(*directories: str) -> str:
        words = [sys.executable, "-c", LOADS, *directories]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout

    refused = said(*(str(tmp_path / str(index)) for index in range(len(names))))
    assert refused.count("base of its adapters can't be loaded") == len(names) and not Hub.asked
    assert said("someone/quietstar") and Hub.asked  # the hub is there, for who names a model


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json", "sub/vocab.json"])
@pytest.mark.parametrize("place", ["snapshots/m", "models--x/snapshots/m", "hub/models--x/snapshots/m"])
def test_links_out_of_what_looks_like_the_hubs_cache(plain: Path, name: str, place: str) -> None:
    """Every link out of a directory of the name `snapshots` was followed as far as the directory above."""
    directory = plain.parent / "deep" / place
    directory.parent.mkdir(parents=True)
    shutil.move(plain, directory)
    (directory / name).parent.mkdir(exist_ok=True)
    above = directory.parent.parent
    for target in (above / "secret", above / "other" / "blobs" / "x", above / "snapshots" / "other", plain):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(directory / "config.json", target)
        (directory / name).with_suffix(".link").symlink_to(target)
        with pytest.raises(CheckpointError, match=r"\.link: is a link out of its directory"):
            check_model_directory(directory)
        (directory / name).with_suffix(".link").unlink()
    (above / "blobs").symlink_to(above.parent)
    (directory / name).with_suffix(".link").symlink_to(above / "blobs" / above.name / "secret")
    with pytest.raises(CheckpointError, match=r"\.link: is a link out of its directory"):
        check_model_directory(directory)


@pytest.mark.parametrize(
    "name",
    [
        "generation_config.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "added_tokens.json",
        "adapter/x",
    ],
)
@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFSOCK])
def test_a_file_that_may_never_end_is_named(plain: Path, name: str, kind: int) -> None:
    """A named pipe was waited for, without an end and without a word."""
    (plain / name).parent.mkdir(exist_ok=True)
    (plain / name).unlink(missing_ok=True)
    os.mknod(plain / name, kind | 0o600)
    for load in (load_causal_lm, load_tokenizer, QuietStarForCausalLM.from_pretrained):
        (plain / "vocab.json").touch()  # for the tokenizer to get as far
        with pytest.raises(CheckpointError, match=f"{name}: is a pipe, a socket or a device, needs a file"):
            load(plain)


@pytest.mark.parametrize("keys", [3_000, 30_000])
def test_a_directory_that_no_field_can_mend_is_given_up(plain: Path, keys: int) -> None:
    """The search for the field at fault loaded the directory once for every field."""
    (plain / "config.json").write_text(json.dumps({f"key{number}": number for number in range(keys)}))
    loads: list[Path] = []

    def load(directory: Path) -> None:
        loads.append(directory)
        raise ValueError

    assert culprit(plain, ["config.json"], ValueError("x"), load) is None
    assert 0 < len(loads) <= 200


def test_a_base_in_the_cache_of_the_hub_is_loaded_without_the_hub(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--someone--base" / "snapshots" / ("0" * 40)
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    (snapshot.parent.parent / "refs/main").write_text("0" * 40)
    shutil.copytree(plain, snapshot)
    model = QuietStarForCausalLM.from_base(plain, start_text=[5], end_text=[5])
    add_adapters(model, 2, 4)
    model.save_pretrained(tmp_path / "adapters")
    options = json.loads((tmp_path / "adapters" / OPTIONS).read_text())
    (tmp_path / "adapters" / OPTIONS).write_text(json.dumps(options | {"base_model_name_or_path": "someone/base"}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path / "adapters")
    ids = torch.tensor([[3, 5, 7, 9]])
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)
