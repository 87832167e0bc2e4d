"""Model directories with wrong values, hostile headers and foreign weights: one line that names the file, early."""

from __future__ import annotations

import json
import shutil
import string
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quietstar.config.options import check_weights_format
from quietstar.data.tokenizer import ChatTemplate, load_tokenizer
from quietstar.errors import CheckpointError, ConfigError, QuietStarError
from quietstar.inference.loading import load_thinking
from quietstar.model.adapters import OPTIONS, add_adapters
from quietstar.model.loading import character_tokenizer, load_causal_lm, read_header
from quietstar.model.modeling import QuietStarForCausalLM
from tests.model.tiny import FAMILIES, make_base, make_model

INDEX = "model.safetensors.index.json"
DELETED = object()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    tokenizer = character_tokenizer(string.ascii_letters[:39], end="<e>")
    make_base("llama").save_pretrained(home / "plain")
    make_model("llama").save_pretrained(home / "thinking")
    adapted = QuietStarForCausalLM.from_base(home / "plain", start_text=[5], end_text=[5])
    add_adapters(adapted, 2, 4)
    adapted.save_pretrained(home / "adapters")
    for place in home.iterdir():
        tokenizer.save_pretrained(place)
    return home


@pytest.fixture
def plain(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "plain", tmp_path / "model"))


@pytest.fixture
def thinking(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "thinking", tmp_path / "model"))


@pytest.fixture
def adapters(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "adapters", tmp_path / "model"))


def change(file: Path, field: str, value: Any) -> None:
    *outer, last = field.split(".")
    content = json.loads(file.read_text())
    inside = content
    for name in outer:
        inside = inside[name]
    inside.pop(last, None)
    if value is not DELETED:
        inside[last] = value
    file.write_text(json.dumps(content))


def refusal(load: Callable[[Path], object], place: Path) -> str:
    with pytest.raises(QuietStarError) as caught:
        load(place)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("hidden_act", value) for value in (3, None, "no-such-function", [])),
        *(("rms_norm_eps", value) for value in ("a", None, [1])),
        *(("attention_bias", value) for value in ("x", 3)),
        *(("rope_parameters", value) for value in (3, "x")),
        *(("rope_parameters.rope_theta", value) for value in ("a", {})),
        *(("dtype", value) for value in ("no-such-type", "int8", 3)),
        *(("eos_token_id", value) for value in ("a", -5, {}, [1, "x"])),
        *(("pad_token_id", value) for value in ("x", 100)),
        *(("tie_word_embeddings", value) for value in ("x", 3)),
        *(("layer_types", value) for value in (3, ["no-such-kind"])),
        ("quantization_config", []),
        ("quantization_config", {}),
        ("max_position_embeddings", 10**12),
        ("num_hidden_layers", 10**8),
        ("transformers_weights", "../x.safetensors"),
    ],
)
def test_what_a_family_refuses_is_named_with_its_file(plain: Path, field: str, value: Any) -> None:
    """Strict dataclasses and assertions of transformers came as tracebacks; others named no field."""
    change(plain / "config.json", field, value)
    assert f"config.json: {field}" in refusal(load_causal_lm, plain)
    assert "tokenizer" not in refusal(load_causal_lm, plain)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("thought_length", value) for value in (0, "8", None, True, 1.5, 10**9)),
        *(("lookahead", value) for value in (-1, "x")),
        *(("mixing_activation", value) for value in ("relu", 3)),
        *(("initial_mixing_weight", value) for value in ("x", float("nan"))),
        *(("embedding_scale", value) for value in (0, "x")),
        *(("banned_token_ids", value) for value in (3, ["a"], [-1], [40], [1.5], [True], list(range(40)))),
        *(("thinking_gate", value) for value in ("x", 3)),
        *(("thinking_threshold", value) for value in ("x", float("nan"), None)),
        *(("text_config.hidden_act", value) for value in (3, "no-such-function")),
        ("text_config.model_type", "no-such-family"),
        ("text_config.num_hidden_layers", 9_999),
    ],
)
@pytest.mark.parametrize("load", [lambda d: load_thinking(d, device="cpu"), QuietStarForCausalLM.from_pretrained])
def test_how_a_model_thinks_is_checked(thinking: Path, field: str, value: Any, load: Callable[[Path], object]) -> None:
    """`thought_length` null, true and 1.5, and a fraction as a token id, were taken."""
    options = thinking / "config.json"
    change(options, field, value)
    assert f"{options}: {field}" in refusal(load, thinking)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("eos_token_id", value) for value in ("a", 1.5, {}, [1, "x"], -5)),
        *(("temperature", value) for value in ("x", -1)),
        *(("top_p", value) for value in ("x", 5)),
        *(("max_new_tokens", value) for value in ("x", 0)),
        *(("suppress_tokens", value) for value in ("x", [1.5])),
        *(("cache_implementation", value) for value in ("no-such-cache", 3)),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "thinking", "adapters"])
def test_how_a_model_generates_is_checked(originals: Path, tmp_path: Path, kind: str, field: str, value: Any) -> None:
    place = Path(shutil.copytree(originals / kind, tmp_path / "model"))
    change(place / "generation_config.json", field, value)
    load: Any = load_causal_lm if kind == "plain" else lambda d: load_thinking(d, device="cpu")
    assert f"generation_config.json: {field}" in refusal(load, place)


@pytest.mark.parametrize("text", ["[]", "{", "3", "null", '"x"', "", "[" * 100_000, '{"a": 1, "a": 2}', "\xff"])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", OPTIONS]
)
def test_a_file_that_is_no_object_is_named(adapters: Path, name: str, text: str) -> None:
    (adapters / name).write_bytes(text.encode("latin-1"))
    assert name in refusal(lambda d: load_thinking(d, device="cpu"), adapters)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *(("tokenizer_config.json", "eos_token", value) for value in (3, ["x"], {"content": 3})),
        *(("tokenizer_config.json", "tokenizer_class", value) for value in (3, "PreTrainedModel")),
        *(("tokenizer_config.json", "model_max_length", value) for value in ("x", 0)),
        *(("tokenizer_config.json", "chat_template", value) for value in (3, ["x"])),
        *(("tokenizer_config.json", "padding_side", value) for value in ("up", 3)),
        ("tokenizer_config.json", "added_tokens_decoder", {"a": 3}),
        *(("tokenizer.json", "version", value) for value in (3, "9")),
        *(("tokenizer.json", "pre_tokenizer", value) for value in (3, {"type": "no-such-type"})),
        ("config.json", "hidden_act", 3),
    ],
)
def test_a_tokenizer_names_the_file_at_fault(plain: Path, name: str, field: str, value: Any) -> None:
    """An error in config.json was told as one of the tokenizer."""
    change(plain / name, field, value)
    message = refusal(load_tokenizer, plain)
    assert f"{name}: {field}" in message
    assert ("the tokenizer of" in message) <= (name != "config.json")


@pytest.mark.parametrize("model", [3, None, {}, {"type": "WordLevel"}, {"type": "BPE", "vocab": {"a": -1}}])
def test_a_vocabulary_that_cannot_be_read_is_named(plain: Path, model: Any) -> None:
    change(plain / "tokenizer.json", "model", model)
    assert str(plain / "tokenizer.json") in refusal(load_tokenizer, plain)


@pytest.mark.parametrize("template", ["{{", "{% for %}", "{% if x %}", "{{ 1 + }}", "{% no-such-tag %}"])
def test_a_chat_template_that_is_none(plain: Path, template: str) -> None:
    tokenizer = load_tokenizer(plain)
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=r"chat template of .* is no Jinja template"):
        ChatTemplate(tokenizer)([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("hidden_size", value) for value in (64, 10**9)),
        *(("vocab_size", value) for value in (39, 41, 10**9)),
        *(("intermediate_size", value) for value in (47, 10**9)),
        *(("num_hidden_layers", value) for value in (1, 3, 9_999)),
        *(("head_dim", value) for value in (16, 10**9)),
        ("num_key_value_heads", 4),
        ("attention_bias", True),
        ("model_type", "gpt2"),
    ],
)
def test_sizes_are_compared_with_the_headers_before_memory_is_taken(
    plain: Path, field: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers gave memory to the sizes of config.json first, and a layer fewer was loaded without a word."""

    def loading(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("quietstar.model.loading.AutoModelForCausalLM.from_pretrained", loading)
    change(plain / "config.json", field, value)
    message = refusal(load_causal_lm, plain)
    assert "config.json" in message
    assert "weight" in message or "tensors" in message


@pytest.mark.parametrize("family", FAMILIES)
def test_what_every_family_saves_fits_its_own_configuration(tmp_path: Path, family: str) -> None:
    make_base(family).save_pretrained(tmp_path)
    load_causal_lm(tmp_path)


def with_header(change_header: Callable[[dict[str, Any], str], Any]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        raw = file.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        text = change_header(header, next(name for name in header if name.endswith("embed_tokens.weight")))
        text = text if isinstance(text, bytes) else json.dumps(text).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + raw[end:])

    return damage


def _set(**fields: Any) -> Callable[[Path], None]:
    return with_header(lambda header, name: header | {name: header[name] | fields})


HEADERS: dict[str, Callable[[Path], Any]] = {
    "length of 2**63": lambda file: file.write_bytes(struct.pack("<Q", 2**63) + file.read_bytes()[8:]),
    "length of 2**33": lambda file: file.write_bytes(struct.pack("<Q", 2**33) + file.read_bytes()[8:]),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "more bytes": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "empty": lambda file: file.write_bytes(b""),
    "offsets beyond": _set(data_offsets=[0, 10**12]),
    "offsets below 0": _set(data_offsets=[-4, 5116]),
    "offsets of another": _set(data_offsets=[0, 5120]),
    "shape that overflows": _set(shape=[2**40, 2**40]),
    "unknown type": _set(dtype="F31"),
    "type of another width": _set(dtype="F16"),
    "no object": with_header(lambda header, name: []),
    "deep": with_header(lambda header, name: b"[" * 200_000),
    "no UTF-8": with_header(lambda header, name: b"\xff\xff"),
    "a name twice": with_header(
        lambda header, name: (json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}').encode()
    ),
}


@pytest.mark.parametrize("damage", HEADERS)
@pytest.mark.parametrize("kind", ["plain", "thinking"])
def test_hostile_headers(originals: Path, tmp_path: Path, kind: str, damage: str) -> None:
    place = Path(shutil.copytree(originals / kind, tmp_path / "model"))
    HEADERS[damage](place / "model.safetensors")
    load: Any = load_causal_lm if kind == "plain" else QuietStarForCausalLM.from_pretrained
    assert "model.safetensors: cannot be read as safetensors" in refusal(load, place)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        read_header(place / "model.safetensors")


@pytest.mark.parametrize(("dtype", "shape"), [("I32", [40, 32]), ("U32", [40, 32]), ("F32", [32, 40]), ("F32", [1280])])
def test_headers_of_another_tensor(plain: Path, dtype: str, shape: list[int]) -> None:
    _set(dtype=dtype, shape=shape)(plain / "model.safetensors")
    assert "model.safetensors: 'model.embed_tokens.weight'" in refusal(load_causal_lm, plain)


def test_a_header_says_what_the_library_says(plain: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.bfloat16)
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    found = read_header(plain / "model.safetensors")
    assert {name: one.shape for name, one in found.items()} == {name: tuple(t.shape) for name, t in tensors.items()}
    assert {one.dtype for one in found.values()} == {"F32", "BF16"}
    load_causal_lm(plain)


def sharded(place: Path) -> dict[str, str]:
    tensors = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: "a.safetensors" if number < 5 else "b.safetensors" for number, name in enumerate(names)}
    for shard in set(weight_map.values()):
        own = {name: tensors[name] for name in names if weight_map[name] == shard}
        save_file(own, place / shard, {"format": "pt"})
    (place / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def _swapped(place: Path, names: dict[str, str]) -> dict[str, str]:
    return {name: "b.safetensors" if file == "a.safetensors" else "a.safetensors" for name, file in names.items()}


def _both(place: Path, names: dict[str, str]) -> dict[str, str]:
    save_file({"x": torch.zeros(1)}, place / "model.safetensors", {"format": "pt"})
    return names


def _twice(place: Path, names: dict[str, str]) -> dict[str, str]:
    tensors, others = load_file(place / "a.safetensors"), load_file(place / "b.safetensors")
    save_file(tensors | dict(list(others.items())[:1]), place / "a.safetensors", {"format": "pt"})
    return names


def _gone(place: Path, names: dict[str, str]) -> dict[str, str]:
    (place / "b.safetensors").unlink()
    return names


INDEXES: dict[str, tuple[Callable[[Path, dict[str, str]], Any], str]] = {
    "a list": (lambda place, names: list(names), "weight_map: needs an object"),
    "null": (lambda place, names: None, "weight_map: needs an object"),
    "nothing": (lambda place, names: {}, "weight_map: needs an object"),
    "a name too few": (lambda place, names: dict(list(names.items())[1:]), "weight_map: lacks"),
    "a name too many": (lambda place, names: names | {"x": "a.safetensors"}, "a.safetensors has no 'x'"),
    "swapped": (_swapped, "weight_map: b.safetensors has no"),
    "a shard too few": (_gone, "b.safetensors: missing"),
    "a single file too": (_both, "has both"),
    "a tensor twice": (_twice, "which a.safetensors has too"),
}


@pytest.mark.parametrize("fault", INDEXES)
def test_hostile_indexes(plain: Path, fault: str) -> None:
    names = sharded(plain)
    load_causal_lm(plain)
    made, message = INDEXES[fault]
    (plain / INDEX).write_text(json.dumps({"weight_map": made(plain, names)}))
    assert message in refusal(load_causal_lm, plain)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("x.gguf", "gguf_file"),
        ("pytorch_model.bin", "save_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "save_pretrained"),
        ("tf_model.h5", "from_tf"),
        ("flax_model.msgpack", "from_flax"),
        ("model.ckpt", "converts"),
        ("consolidated.00.pth", "converts"),
        ("consolidated.safetensors", "converts"),
    ],
)
def test_weights_of_another_format_are_named(originals: Path, thinking: Path, name: str, advice: str) -> None:
    check_weights_format(thinking)
    (thinking / name).write_bytes(b"x")
    QuietStarForCausalLM.from_pretrained(thinking)  # beside safetensors it does not matter
    (thinking / "model.safetensors").unlink()
    for load in (load_causal_lm, QuietStarForCausalLM.from_pretrained, lambda d: load_thinking(d, device="cpu")):
        message = refusal(load, thinking)
        assert name in message
        assert advice in message
    for other in thinking.iterdir():
        if other.name != name:
            other.unlink()
    assert name in refusal(load_tokenizer, thinking)
    assert name in refusal(load_causal_lm, thinking)


@pytest.mark.parametrize("name", ["optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth"])
def test_other_files_of_a_trainer_are_no_weights(plain: Path, name: str) -> None:
    (plain / "model.safetensors").unlink()
    (plain / name).write_bytes(b"x")
    assert "it has no weights" in refusal(load_causal_lm, plain)


LINKED = [INDEX, "model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja", "adapter", OPTIONS]


@pytest.mark.parametrize("name", [*LINKED, "additional_chat_templates/x.jinja", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("chain", [1, 3])
def test_links_out_of_a_directory(plain: Path, name: str, chain: int) -> None:
    outside = plain.parent / "outside"
    outside.mkdir()
    for number in range(1, chain):
        (plain.parent / f"link-{number}").symlink_to(outside if number == 1 else plain.parent / f"link-{number - 1}")
    target = plain.parent / f"link-{chain - 1}" if chain > 1 else outside
    (plain / name).parent.mkdir(exist_ok=True)
    (plain / name).unlink(missing_ok=True)
    (plain / name).symlink_to(target)
    for load in (load_causal_lm, load_tokenizer, QuietStarForCausalLM.from_pretrained):
        assert "is a link out of its directory" in refusal(load, plain)


def test_links_within_a_directory_are_followed(plain: Path) -> None:
    shutil.move(plain / "model.safetensors", plain / "weights.safetensors")
    (plain / "model.safetensors").symlink_to("weights.safetensors")
    load_causal_lm(plain)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("r", value) for value in (0, -1, "2", 2.5, True, 3, 10**9, 10**30, None, DELETED)),
        *(("lora_alpha", value) for value in ("x", None, float("nan"), -4, 0)),
        *(("target_modules", value) for value in ("q_proj", [], [3], ["no-such-layer"], None, [""])),
        *(("base_model_name_or_path", value) for value in (3, ["x"], True, "", "..", "../plain", "/no/such", "a/b/c")),
        *(("base_model_name_or_path", value) for value in ("~", "file:///etc", "https://x.y/z", "/etc/passwd", "\0")),
        *(("use_dora", value) for value in (True, "x")),
        ("peft_type", "LOHA"),
        ("rank_pattern", {"q_proj": 3}),
    ],
)
def test_options_of_adapters(adapters: Path, field: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of 10**9 took its memory, and "q_proj" became the layers q, _, p, r, o and j."""

    def network(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", network)
    change(adapters / OPTIONS, field, value)
    for load in (QuietStarForCausalLM.from_pretrained, lambda d: load_thinking(d, device="cpu")):
        message = refusal(load, adapters)
        assert OPTIONS in message
        assert field in message


def test_adapters_that_are_their_own_base(adapters: Path) -> None:
    change(adapters / OPTIONS, "base_model_name_or_path", str(adapters))
    assert "has adapters itself" in refusal(QuietStarForCausalLM.from_pretrained, adapters)


@pytest.mark.parametrize("kind", ["plain", "thinking", "adapters"])
def test_adapters_of_peft_do_not_fetch_their_base(
    originals: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an `adapter_config.json` beside its weights, transformers loaded the base that this names, from the hub."""

    def network(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", network)
    place = Path(shutil.copytree(originals / kind, tmp_path / "model"))
    (place / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    for load in (load_causal_lm, load_tokenizer, QuietStarForCausalLM.from_pretrained):
        assert "adapter_config.json: this is a directory of peft's adapters" in refusal(load, place)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("kind", "file", "part"),
    [
        ("thinking", "model.safetensors", "model.norm.weight"),
        ("thinking", "model.safetensors", "thought_embedding.weight"),
        ("thinking", "model.safetensors", "mixing_head"),
        ("adapters", "adapter/adapter_model.safetensors", "q_proj.lora_A"),
        ("adapters", "adapter/adapter_model.safetensors", "up_proj.lora_B"),
    ],
)
def test_weights_that_are_not_finite_are_not_blamed_on_attention(
    originals: Path, tmp_path: Path, kind: str, file: str, part: str, value: float
) -> None:
    place = Path(shutil.copytree(originals / kind, tmp_path / "model"))
    tensors = load_file(place / file)
    tensors[next(name for name in tensors if part in name)].view(-1)[0] = value
    save_file(tensors, place / file, {"format": "pt"})
    message = refusal(lambda d: load_thinking(d, device="cpu"), place)
    assert "NaN or infinite" in message
    assert "attention does" not in message
