"""What would be silently wrong is refused, by name and with its reason."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.errors import ConfigError, DataError, UnsupportedBackboneError
from quietstar.model.attention import quietstar_attention
from quietstar.objective.learning import learn
from tests.model.tiny import GROUPED, SIZES, VOCABULARY, make_base, make_ids, make_model

IDS = make_ids(2, 6)
GPTJ: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
NO_INTERFACE = "its layers do not use transformers' attention interface"
INTERFACE_OR_HEAD = f"{NO_INTERFACE}|its lm_head has a bias"
"""Since transformers 5.24 the layers do, and the head is what remains."""

UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "gptj": (GPTJ, INTERFACE_OR_HEAD),
    "codegen": (GPTJ, INTERFACE_OR_HEAD),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, NO_INTERFACE),
    "falcon": ({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}, NO_INTERFACE),
    "mpt": ({"d_model": 32, "n_layers": 2, "n_heads": 4}, NO_INTERFACE),
    "stablelm": (GROUPED, "0 of 2 layers passed thought attention .* do not hand its keyword arguments on"),
    "gpt_oss": (
        {**GROUPED, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": None},
        "uses attention sinks",
    ),
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "can't be run in one pass"),
    "jamba": ({**GROUPED, "use_mamba_kernels": False}, "of 2 layers passed thought attention"),
    "phi": (SIZES, "its lm_head has a bias"),
    "llama4_text": (
        {**GROUPED, "head_dim": 8, "num_local_experts": 2, "layer_types": ["chunked_attention", "full_attention"]},
        "chunked attention is not supported",
    ),
    "phi3": (
        {
            **GROUPED,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 32,
            },
        },
        r"rotary frequencies depend on the longest position in a batch \(longrope\)",
    ),
    "llama": (
        {**GROUPED, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        r"rotary frequencies depend on the longest position in a batch \(dynamic\)",
    ),
}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_unsupported_families(family: str) -> None:
    fields, reason = UNSUPPORTED[family]
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**fields, "vocab_size": VOCABULARY}))
    with pytest.raises(UnsupportedBackboneError, match=reason) as caught:
        QuietStarForCausalLM.from_base(base, start_text=[5], end_text=[6])
    assert family in str(caught.value).lower().replace("gptoss", "gpt_oss")


def test_static_rope_scaling_is_fine() -> None:
    for parameters in (
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32},
    ):
        assert learn(make_model("llama", changes={"rope_parameters": parameters}), IDS).loss.isfinite()


def test_dropout_of_any_name_is_off() -> None:
    """Families have rates of names of their own; what sampled a thought must be what is trained."""
    config = AutoConfig.for_model("seed_oss", **{**GROUPED, "head_dim": 8, "residual_dropout": 0.5})
    base = AutoModelForCausalLM.from_config(config).train()
    model = QuietStarForCausalLM.from_base(base, start_text=[5], end_text=[6]).train()
    losses = {float(learn(model, IDS, seed=3).loss) for _ in range(3)}
    assert len(losses) == 1


def test_an_encoder_decoder(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedBackboneError, match="t5: an encoder-decoder model"):
        QuietStarForCausalLM.from_base(tmp_path, start_text=[5], end_text=[6])


def test_a_window_that_the_layers_do_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that keeps its window in its own mask would let streams see the whole text."""
    base = make_base("mistral_window")

    def forgets(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        return quietstar_attention(*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "quietstar", forgets)
    with pytest.raises(UnsupportedBackboneError, match="mistral: layer 0 is sliding_attention with a window of 4"):
        QuietStarForCausalLM.from_base(base, start_text=[5], end_text=[6])


@pytest.mark.parametrize("error", [0.9, 0.99])
def test_an_attention_that_does_something_else(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    """The probe compares with the family's own attention, so it sees a scale that is off by a hundredth."""
    base = make_base("granite")

    def scaled(*args: Any, scaling: float, **kwargs: Any) -> Any:
        return quietstar_attention(*args, scaling=scaling * error, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "quietstar", scaled)
    with pytest.raises(UnsupportedBackboneError, match="granite: text states differ from the plain model's"):
        QuietStarForCausalLM.from_base(base, start_text=[5], end_text=[6])


@pytest.mark.parametrize("seed", [0, 2])
def test_a_deep_model_in_low_precision(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """32 layers in bfloat16 round by 6 % of their states; random models of a 7B's depth were refused for that."""
    base = make_base("llama", seed=seed, num_hidden_layers=32, dtype=torch.bfloat16)
    QuietStarForCausalLM.from_base(base, start_text=[5], end_text=[6])

    def scaled(*args: Any, scaling: float, **kwargs: Any) -> Any:
        return quietstar_attention(*args, scaling=scaling / 2, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "quietstar", scaled)
    with pytest.raises(UnsupportedBackboneError, match="llama: text states differ from the plain model's"):
        QuietStarForCausalLM.from_base(base, start_text=[5], end_text=[6])


def test_logits_that_the_head_does_not_explain() -> None:
    model = make_model("cohere")
    model.base.config.logit_scale = 0.5  # the probe's view; the module keeps its 0.3
    model.probed = False
    with pytest.raises(
        UnsupportedBackboneError, match="cohere: lm_head applied to the final states gives other logits"
    ):
        model.think(IDS)


def test_an_attention_that_is_replaced_afterwards() -> None:
    model = make_model()
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedBackboneError, match="its attention is now 'sdpa'"):
        learn(model, IDS)


def test_an_adapter_on_the_head() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(UnsupportedBackboneError, match=r"mistral: its lm_head is a peft\..*Linear, .* a plain one"):
        learn(adapted, IDS)


def test_an_adapted_base_says_what_to_do_instead() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make_base(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"base: got a PeftModel.*get_peft_model\(model, config\)"):
        QuietStarForCausalLM.from_base(adapted, start_text=[5], end_text=[6])


# -- directories -------------------------------------------------------------------------------------------------------


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a model directory, it has no config.json".replace(".", r"\.")):
        QuietStarForCausalLM.from_base(tmp_path)


def test_a_directory_without_weights_or_with_torn_ones(tmp_path: Path) -> None:
    make_base().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="can't be loaded as a causal language model"):
        QuietStarForCausalLM.from_base(tmp_path, start_text=[5], end_text=[6])
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="can't be loaded as a causal language model"):
        QuietStarForCausalLM.from_base(tmp_path, start_text=[5], end_text=[6])


def test_a_configuration_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read as JSON"):
        QuietStarForCausalLM.from_base(tmp_path)


def test_a_path_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="/no/such/model: can't be loaded"):
        QuietStarForCausalLM.from_base("/no/such/model")


def test_a_model_whose_tokenizer_is_missing(tmp_path: Path) -> None:
    make_base().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        QuietStarForCausalLM.from_base(tmp_path)
    with pytest.raises(ConfigError, match="start_text: got the text '---' without a tokenizer"):
        QuietStarForCausalLM.from_base(make_base(), end_text=[6])


def test_token_ids_that_do_not_belong_to_the_model() -> None:
    with pytest.raises(ConfigError, match=r"end_text: \[6, 40\] has the token ids \[6, 40\], the base has 40 tokens"):
        QuietStarForCausalLM.from_base(make_base(), start_text=[5], end_text=[6, 40])
    with pytest.raises(ConfigError, match=r"start_text: \[\] has no tokens"):
        QuietStarForCausalLM.from_base(make_base(), start_text=[], end_text=[6])


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thought_length": 0}, "thought_length: got 0, needs at least 1"),
        ({"lookahead": 0}, "lookahead: got 0, needs at least 1"),
        ({"thoughts_per_position": 0}, "thoughts_per_position: got 0, needs at least 1"),
        ({"temperature": 0.0}, "temperature: got 0.0, needs a finite number above 0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"embedding_scale": -1.0}, "embedding_scale: got -1.0"),
        ({"interpolation": "linear"}, "interpolation: got 'linear', needs one of logits, log_probs"),
        ({"mixing_activation": "tanh"}, "mixing_activation: got 'tanh', needs one of identity, sigmoid"),
        ({"thinking": "loud"}, "thinking: got 'loud', needs one of sample, pause"),
        ({"backend": "cuda"}, "backend: got 'cuda', needs one of auto, triton, torch, reference"),
        ({"mixing_activation": "sigmoid", "initial_mixing_weight": 0.0}, "initial_mixing_weight: got 0.0"),
        ({"banned_token_ids": [3, 40]}, "banned_token_ids: got 40"),
        ({"thougth_length": 3}, "thougth_length: not an option of QuietStarConfig, which has .*thought_length"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuietStarForCausalLM.from_base(make_base(), start_text=[5], end_text=[6], **options)


def test_a_configuration_without_a_base() -> None:
    with pytest.raises(ConfigError, match="text_config: missing"):
        QuietStarForCausalLM(QuietStarConfig())


def test_thinking_options_out_of_range() -> None:
    model = make_model()
    with pytest.raises(ConfigError, match="thoughts_per_position: got 0"):
        model.think(IDS, thoughts_per_position=0)
    with pytest.raises(
        ConfigError, match="temperature: got 0, needs a finite number above 0, at least 1e-30; greedy=True"
    ):
        model.think(IDS, temperature=0)
    with pytest.raises(ConfigError, match="positions: got 'often'"):
        learn(model, IDS, anchors="often")
    with pytest.raises(DataError, match=r"anchors: got 0\.\.6, needs positions in the text, 0\.\.5"):
        learn(model, IDS, anchors=torch.tensor([0, 6]))
    with pytest.raises(DataError, match=r"tokens: got shape \[2, 3, 2\], needs \[2, 10, 2\]"):
        model.think(IDS, tokens=torch.zeros(2, 3, 2, dtype=torch.int64))


def test_thoughts_that_do_not_fit() -> None:
    model = make_model()
    thoughts = model.think(IDS)
    longer = make_model(thought_length=3).think(IDS)
    for reuse in (True, False):
        with pytest.raises(DataError, match=r"thoughts: got tokens \[2, 10, 3\]"):
            learn(model, IDS, thoughts=longer, reuse_sampling_pass=reuse)
        with pytest.raises(DataError, match=r"thoughts: got tokens \[2, 10, 2\] .* needs tokens \[1, 10, 2\]"):
            learn(model, IDS[:1], thoughts=thoughts, reuse_sampling_pass=reuse)
        with pytest.raises(DataError, match=r"thoughts: got anchors 0..4, needs positions in the text, 0\.\.2"):
            learn(model, IDS[:, :3], thoughts=thoughts, reuse_sampling_pass=reuse)
    with pytest.raises(DataError, match="thoughts: got tokens"):
        model.predict(IDS, thoughts=longer)
    for call in (partial(learn, model), model.predict):
        with pytest.raises(ConfigError, match="anchors: can't be given together with thoughts"):
            call(IDS, thoughts=thoughts, anchors="all")


def test_learned_positions_end() -> None:
    model = make_model("gpt2", changes={"n_positions": 12})
    assert learn(model, make_ids(1, 7)).loss.isfinite()  # a stream of the last anchor ends at 5 + 1 + 5 = 11
    with pytest.raises(
        DataError, match="input_ids: a thought would reach position 12, the base has 12 learned positions"
    ):
        learn(model, make_ids(1, 8))


def test_a_text_of_one_token() -> None:
    with pytest.raises(DataError, match="input_ids: got 1 tokens, a text needs at least 2"):
        learn(make_model(), IDS[:, :1])


def test_leave_one_out_needs_two_thoughts() -> None:
    with pytest.raises(ConfigError, match="thoughts_per_position: got 1, the leave_one_out baseline needs at least 2"):
        learn(make_model(thoughts_per_position=1), IDS)


def test_the_triton_backend_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quietstar_kernels.dispatch.interpreting", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="backend: 'triton' wants a CUDA device, and there is none here"):
        make_model(backend="triton")
