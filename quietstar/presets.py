"""Sets of option values, by name. A preset replaces defaults; a configuration file and flags replace a preset."""

from __future__ import annotations

from typing import Any

DESCRIPTIONS: dict[str, str] = {
    "textbook": "the embedded default: a small model, made on the spot, learns which aside to think; needs no files",
    "plain": "your own model and text with the default values; taken where model.path or data.path is given",
    "mistral-7b": "the paper's setting: Mistral-7B on OpenWebMath, the released code's numbers",
    "pause-tokens": "its control: the same streams with pause tokens for thoughts, trained by the prediction alone",
}

PRESETS: dict[str, dict[str, Any]] = {
    "textbook": {
        "output_dir": "runs/textbook",
        "model.thought_length": 8,
        "model.lookahead": 1,
        "model.thoughts_per_position": 2,
        "model.initial_mixing_weight": 0.3,
        "model.start_text": "[",
        "model.end_text": "]",
        "data.length": 40,
        "training.steps": 100,
        "training.batch_size": 8,
        "training.learning_rate": 5e-4,
        "training.warmup_steps": 20,
        "training.final_learning_rate_fraction": 0.05,
        "training.weight_decay": 0.01,
        "training.adam_beta2": 0.98,
        "training.thought_embedding_lr_multiplier": 1.0,
        "training.eval_every": 10,
        "training.keep_checkpoints": 1,
    },
    "plain": {},
    # The released training script. Its n_ahead of 12 counts the text pass, START and END: 9 sampled tokens. Its rate
    # falls over 100,000 steps but it stops after 100, so it is constant here. Its mixing head starts at exactly 0.
    # Not as released: START and END are clipped by themselves and do not decay, padding is masked, and texts come from
    # all of OpenWebMath and not from its first 1,000 documents.
    "mistral-7b": {
        "model.path": "mistralai/Mistral-7B-v0.1",
        "model.dtype": "bfloat16",
        "model.thought_length": 9,
        "model.lookahead": 4,
        "model.thoughts_per_position": 2,
        "model.interpolation": "logits",
        "model.mixing_activation": "identity",
        "model.initial_mixing_weight": None,
        "model.embedding_scale": 100.0,
        "data.source": "openwebmath",
        "data.packing": "crop",
        "data.append_eos": False,
        "data.length": 256,
        "objective.preset": "authors",
        "training.steps": 100,
        "training.batch_size": 8,
        "training.learning_rate": 1e-6,
        "training.warmup_steps": 20,
        "training.schedule": "constant",
        "training.weight_decay": 0.001,
        "training.max_grad_norm": 1.0,
        "training.thought_embedding_lr_multiplier": 1.0,
        "training.eval_every": 10,
        "training.save_every": 100,
    },
}

# What thoughts have to beat (Goyal et al., arXiv 2310.02226): as much computation at the same places, but START and
# fixed tokens without content. All thoughts of a position would be the same, so there is one.
PRESETS["pause-tokens"] = {
    **PRESETS["mistral-7b"],
    "model.thinking": "pause",
    "model.thoughts_per_position": 1,
    "objective.policy_weight": 0.0,
}
