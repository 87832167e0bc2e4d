"""Sets of option values, by name. A preset replaces defaults; a configuration file and flags replace a preset.

Numbers without a remark are those of the method's paper; a remark names what the paper does not say.
"""

from __future__ import annotations

from typing import Any

Preset = dict[str, Any]
"""Option values by dotted key."""

TRAIN_DESCRIPTIONS: dict[str, str] = {
    "textbook": "the embedded default: a small model, made by the run, learns which aside to think; needs no files",
    "plain": "your own model and text with the default values; used if model.path or data.path is given",
    "mistral-7b": "the paper's setting: Mistral-7B on OpenWebMath, the released code's numbers",
    "pause-tokens": "control of mistral-7b: the same streams with pause tokens for thoughts, without REINFORCE",
}

TRAIN_PRESETS: dict[str, Preset] = {
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
TRAIN_PRESETS["pause-tokens"] = {
    **TRAIN_PRESETS["mistral-7b"],
    "model.thinking": "pause",
    "model.thoughts_per_position": 1,
    "objective.policy_weight": 0.0,
}

# arXiv 2203.14465, section 3.1 and appendix H, and the released scripts: Adam, 1e-6 constant after 100 steps of
# warm-up, 8 packed rows of 1,024 tokens, 40 steps growing by 1.2, greedy samples of 96 tokens, 10,000 problems per
# iteration, solved examples before each prompt, nothing carried over between iterations. The number of iterations is
# that of the arithmetic task; on CommonsenseQA and GSM8K the paper runs until held-out accuracy stays. Its arithmetic
# took `linear` steps, 300 and 20 more each iteration: --loop.schedule linear --loop.start_steps 300.
_STAR: Preset = {
    "model.dtype": "bfloat16",
    "problems.limit": 10_000,
    "sampling.samples": 1,
    "sampling.temperature": 0.0,
    "sampling.max_new_tokens": 96,
    "sampling.few_shot": True,
    "loop.iterations": 16,
    "loop.rationalize": True,
    "loop.rationalization_fraction": 1.0,
    "loop.start_from": "base",
    "loop.accumulate": "last",
    "loop.deduplicate": "none",
    "loop.drop_hint_quotes": False,
    "loop.schedule": "exponential",
    "loop.start_steps": 40,
    "loop.growth": 1.2,
    "loop.row_length": 1024,
    "training.batch_size": 8,
    "training.learning_rate": 1e-6,
    "training.warmup_steps": 100,
    "training.schedule": "constant",
    "training.weight_decay": 0.0,
    "training.max_grad_norm": 1.0,
    "loop.keep_models": "last",
}

# arXiv 2308.01825: a generator fine-tuned on the human solutions, 100 samples at 0.7, distinct by their equations,
# one round, 3 epochs at 2e-5 with batches of 128 examples (here 32 rows, into which about 4 examples of GSM8K go each).
# Of completions with the same equations the first stays, the paper keeps the one farthest from the others.
_RFT: Preset = {
    "model.dtype": "bfloat16",
    "sampling.samples": 100,
    "sampling.temperature": 0.7,
    "sampling.max_new_tokens": 256,
    "sampling.few_shot": False,
    "loop.iterations": 1,
    "loop.rationalize": False,
    "loop.demonstrations": True,
    "loop.supervised_start": True,
    "loop.supervised_epochs": 3.0,
    "loop.accumulate": "all",
    "loop.deduplicate": "solution",
    "loop.schedule": "epochs",
    "loop.start_epochs": 3.0,
    "loop.added_epochs": 0.0,
    "training.batch_size": 32,
    "training.learning_rate": 2e-5,
    "training.warmup_steps": 20,
    "training.weight_decay": 0.0,
    "loop.row_length": 2048,
    "loop.keep_models": "last",
}

# arXiv 2312.06585 on MATH: 32 samples at 0.7 of the 40 likeliest tokens, 10 right ones of a problem at most, 3
# iterations, each from the base and on its own samples alone. The paper does not give the learning rate and batch.
_REST_EM: Preset = {
    "model.dtype": "bfloat16",
    "sampling.samples": 32,
    "sampling.temperature": 0.7,
    "sampling.top_k": 40,
    "sampling.max_new_tokens": 512,
    "sampling.few_shot": True,
    "loop.iterations": 3,
    "loop.rationalize": False,
    "loop.accumulate": "last",
    "loop.deduplicate": "exact",
    "loop.max_per_problem": 10,
    "loop.schedule": "epochs",
    "loop.start_epochs": 2.0,
    "loop.added_epochs": 0.0,
    "training.batch_size": 32,
    "training.learning_rate": 1e-5,
    "training.warmup_steps": 20,
    "training.weight_decay": 0.0,
    "loop.row_length": 4096,
    "loop.keep_models": "last",
}

# arXiv 2402.06457 on GSM8K: 3 iterations of 16 samples, 2 epochs, all that was right stays, LoRA, 128 candidates. The
# paper gives no beta, learning rate, rank, temperature or number of pairs: those here are usual ones.
_VSTAR: Preset = {
    "model.dtype": "bfloat16",
    "finetuning.lora_rank": 16,
    "sampling.samples": 16,
    "sampling.temperature": 0.7,
    "sampling.max_new_tokens": 256,
    "sampling.few_shot": False,
    "loop.iterations": 3,
    "loop.rationalize": False,
    "loop.demonstrations": True,
    "loop.supervised_start": True,
    "loop.supervised_epochs": 2.0,
    "loop.accumulate": "all",
    "loop.deduplicate": "exact",
    "loop.schedule": "epochs",
    "loop.start_epochs": 2.0,
    "loop.added_epochs": 0.0,
    "training.batch_size": 32,
    "training.learning_rate": 1e-4,
    "training.warmup_steps": 20,
    "training.weight_decay": 0.0,
    "verifier.beta": 0.1,
    "verifier.pairs_per_problem": 8,
    "verifier.epochs": 1.0,
    "verifier.learning_rate": 5e-5,
    "evaluation.candidates": 128,
    "evaluation.temperature": 0.7,
    "loop.row_length": 2048,
    "loop.keep_models": "last",
}

# All weights in place of adapters, at rates for them, and types as the other commands have them by default.
_PLAIN: Preset = {
    "model.dtype": "float32",
    "finetuning.lora_rank": 0,
    "training.learning_rate": 1e-5,
    "verifier.learning_rate": 5e-7,
    "evaluation.candidates": 64,
}

STAR_DESCRIPTIONS = {
    "addition": "the embedded default: a small model, made by the run, learns to add; needs no files",
    "plain": "your own model and task with the default values; used if model.path is given",
    "star-paper": "STaR with rationalisation, the paper's numbers",
    "star-no-rationalization": "star-paper without rationalisation",
    "rft": "rejection-sampling fine-tuning: 100 samples once, distinct by their equations",
    "rest-em": "ReST-EM: 32 samples per problem, at most 10 kept, three iterations",
}
STAR_PRESETS: dict[str, Preset] = {
    "addition": {
        "output_dir": "runs/star",
        "task": "addition",
        "characters.steps": 500,
        "sampling.max_new_tokens": 64,
        "sampling.batch_size": 512,
        "loop.iterations": 4,
        "loop.demonstrations": True,
        "loop.schedule": "linear",
        "loop.start_steps": 300,
        "loop.added_steps": 50,
        "loop.row_length": 192,
        "training.batch_size": 4,
        "training.learning_rate": 2e-3,
        "training.warmup_steps": 40,
        "training.final_learning_rate_fraction": 0.0,
        "training.weight_decay": 0.05,
        "training.adam_beta2": 0.98,
        "training.save_every": 0,
        "training.log_every": 100,
        "training.keep_checkpoints": 1,
    },
    "plain": {},
    "star-paper": _STAR,
    "star-no-rationalization": {**_STAR, "loop.rationalize": False},
    "rft": _RFT,
    "rest-em": _REST_EM,
}
VSTAR_DESCRIPTIONS = {
    "routes": "the embedded default: a small model, made by the run, learns a task with many right ways",
    "plain": "V-STaR on your own model, with all weights trained; used if model.path is given",
    "vstar": "V-STaR: three iterations of 16 samples, then a verifier by DPO",
    "vstar-1-iteration": "V-STaR with the same budget of 48 samples in one iteration",
}
VSTAR_PRESETS: dict[str, Preset] = {
    "routes": {
        "output_dir": "runs/vstar",
        "task": "routes",
        "characters.steps": 2400,
        "characters.batch_size": 8,
        "characters.row_length": 96,
        "characters.learning_rate": 2.5e-3,
        "problems.per_group": 600,
        "problems.test_per_group": 300,
        "sampling.samples": 16,
        "sampling.temperature": 1.0,
        "sampling.max_new_tokens": 24,
        "sampling.batch_size": 512,
        "loop.iterations": 2,
        "loop.rationalize": False,
        "loop.demonstrations": True,
        "loop.supervised_start": True,
        "loop.supervised_steps": 50,
        "loop.supervised_learning_rate": 5e-4,
        "loop.accumulate": "all",
        "loop.schedule": "linear",
        "loop.start_steps": 200,
        "loop.added_steps": 0,
        "loop.row_length": 96,
        "training.batch_size": 8,
        "training.learning_rate": 1e-3,
        "training.warmup_steps": 20,
        "training.weight_decay": 0.05,
        "training.adam_beta2": 0.98,
        "training.save_every": 0,
        "training.log_every": 100,
        "training.keep_checkpoints": 1,
        "verifier.beta": 0.2,
        "verifier.nll_weight": 1.0,
        "verifier.pairs_per_problem": 16,
        "verifier.steps": 400,
        "verifier.batch_size": 32,
        "verifier.learning_rate": 1.5e-3,
        "verifier.orm_learning_rate": 1e-3,
        "verifier.baselines": True,
        "evaluation.candidates": 32,
        "evaluation.temperature": 1.0,
        "evaluation.ks": "1,2,4,8,16,32",
    },
    "plain": {"output_dir": "runs/vstar", **_VSTAR, **_PLAIN},
    "vstar": {"output_dir": "runs/vstar", **_VSTAR},
    "vstar-1-iteration": {"output_dir": "runs/vstar", **_VSTAR, "sampling.samples": 48, "loop.iterations": 1},
}
