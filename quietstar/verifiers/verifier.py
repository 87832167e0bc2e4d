"""`Verifier`: a model that scores solutions, loaded from its directory; it needs no run beside it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quietstar.config.options import path_kind
from quietstar.data.examples import Example, encode_example
from quietstar.data.tokenizer import tokenizer_fingerprint
from quietstar.errors import CheckpointError, ConfigError
from quietstar.model.adapters import base_fingerprint
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.runs.machine import resolve_device
from quietstar.verifiers.dpo import DPO, LIKELIHOOD
from quietstar.verifiers.outcome_reward import ORM, encode_steps, step_scores
from quietstar.verifiers.pairs import token_logprobs
from quietstar.verifiers.training import VERIFIER, Kind, check_files, load_policy, read_description

KINDS: dict[str, Kind] = {"dpo": DPO, "likelihood": LIKELIHOOD, "orm": ORM}
"""Kinds of verifiers by the name in `verifier.json` and in a run's directories. V-STaR's verifier is the first; the
others are its baselines."""

PLAIN = "likelihood"
"""Kind of a model directory without `verifier.json`."""


class Verifier:
    """Scores solutions of a problem: the higher, the better.

    A model of V-STaR (kind `dpo`) or of the control without negatives (`likelihood`, like any plain model directory)
    scores by log-probability in nats: the `sum` over the solution's tokens (the paper's), their `mean`, or the `ratio`,
    which is the sum minus the sum under the reference. An outcome reward model (`orm`) scores by the probability that
    the solution is right: after the solution's `last` token, or the `mean` over all of its tokens.

    Args:
        directory: Directory of a verifier, or any directory or hub name of a causal language model.
        device: Device to score on: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: Type of the weights, such as `float32`; None: the type they are saved in.
        reference: Present directory of the reference, for `ratio`; None: the one recorded in training.
        batch_tokens: Approximate number of tokens per forward pass; a pass holds at least one solution.

    Attributes:
        kind: Kind of verifier: `dpo`, `likelihood` or `orm`.
        default_score: Name of the score that is used if none is named.
        beta: Coefficient of the verifier's DPO loss; 1 if it has none.
        fingerprint: Hash of the weights and the kind; it tells verifiers apart.

    Raises:
        ConfigError: The model cannot be loaded.
        CheckpointError: `verifier.json` is damaged, or the directory's tokenizer is not the one of the training.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        device: str = "auto",
        dtype: str | None = None,
        reference: str | os.PathLike[str] | None = None,
        batch_tokens: int = 8192,
    ) -> None:
        self.directory = os.fspath(directory)
        described = path_kind(Path(directory) / VERIFIER, "verifier") == "file"
        self._description: dict[str, Any] = read_description(Path(directory)) if described else {}
        self.kind: str = self._description.get("kind", PLAIN)
        if self.kind not in KINDS:
            raise CheckpointError(f"{self.directory}: is a verifier of the unknown kind {self.kind!r}")
        self._kind = KINDS[self.kind]
        self.default_score: str = self._description.get("score", self._kind.scores[0])
        self.beta: float = self._description.get("beta", 1.0)
        self._device, self._dtype = resolve_device(device), dtype
        self._reference_path = reference
        self._loaded_reference: QuietStarForCausalLM | None = None
        self._batch_tokens = batch_tokens
        check_files(Path(directory), self._description)
        self._policy, self.tokenizer = load_policy(self.directory, dtype, device=self._device)
        trained_with = self._description.get("tokenizer")
        if trained_with is not None and trained_with != tokenizer_fingerprint(self.tokenizer):
            raise CheckpointError(
                f"{self.directory}: its tokenizer ({len(self.tokenizer)} tokens) is not the one that the verifier was "
                f"trained with ({trained_with.get('vocabulary_size')} tokens); put that one's files back"
            )
        self._token_scores, weights = self._kind.load(self._policy, Path(directory), self._description)
        parts = [base_fingerprint(self._policy), self.kind, *(str(tensor.tolist()) for tensor in weights)]
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()

    def score(self, prompt: str, solutions: Sequence[str], how: str | None = None) -> list[float]:
        """Returns the scores of solutions of one problem.

        Args:
            prompt: Prompt that the generator was given, without a hint.
            solutions: Completions of the generator, without the end-of-sequence token.
            how: Name of the score, such as `sum`; None: `default_score`.

        Raises:
            ConfigError: The kind of verifier has no such score.
            CheckpointError: The reference of `ratio` is missing or is another model.
            DataError: A prompt has no tokens, or a solution does not fit the model's context.
        """
        return self.score_many([(prompt, solution) for solution in solutions], how)

    def score_many(
        self, candidates: Sequence[tuple[str, str]], how: str | None = None, names: Sequence[str] = ()
    ) -> list[float]:
        """Returns the scores of solutions of any problems.

        Args:
            candidates: Pairs of a prompt and a solution.
            how: Name of the score, such as `sum`; None: `default_score`.
            names: Name of each candidate in error messages; empty: they are numbered.

        Raises:
            ConfigError, CheckpointError, DataError: As `score`.
        """
        how = self.check_score(how)
        return self.scores(candidates, [how], names)[how]

    def scores(
        self, candidates: Sequence[tuple[str, str]], hows: Sequence[str], names: Sequence[str] = ()
    ) -> dict[str, list[float]]:
        """Returns several scores of each solution for the cost of one; `ratio` costs one pass of the reference more.

        Args:
            candidates, names: Pairs of a prompt and a solution, and their names, as for `score_many`.
            hows: Names of the scores.

        Raises:
            ConfigError, CheckpointError, DataError: As `score`.
        """
        for how in hows:
            self.check_score(how)
        called = names or [f"candidate {number}" for number in range(1, len(candidates) + 1)]
        examples = [
            encode_example(self.tokenizer, prompt, solution, name)
            for (prompt, solution), name in zip(candidates, called, strict=True)
        ]
        if not examples:
            return {how: [] for how in hows}
        plain = self._tokens(examples, self._kind.scores[0]) if set(hows) != {"ratio"} else []
        found = {how: [_of_tokens(tokens, how) for tokens in plain] for how in hows if how != "ratio"}
        if "ratio" in hows:
            found["ratio"] = [_of_tokens(tokens, "sum") for tokens in self._tokens(examples, "ratio")]
        return found

    def score_steps(self, prompt: str, steps: Sequence[str], how: str | None = None) -> list[float]:
        """Returns a score between 0 and 1 for each step of a solution, from one forward pass.

        An outcome reward model gives the probability after the step's last token. The other kinds give the geometric
        mean of the probabilities of the step's tokens; or, with `ratio`, sigmoid(beta * log-ratio) of the solution up
        to the step's end: the probability that it is preferred to a solution with log-ratio 0. A step without tokens
        has the score of the step before it; a first step without tokens has 1, with an outcome reward model 1/2.
        `process_score` joins the scores of a solution's steps.

        Args:
            prompt: Prompt that the generator was given, without a hint.
            steps: Texts of the steps; joined, they are the solution.
            how: Name of the score: `ratio`, or None for the kind's own.

        Raises:
            ConfigError, CheckpointError, DataError: As `score`.
        """
        return self.score_steps_many([(prompt, steps)], how)[0]

    def score_steps_many(
        self, candidates: Sequence[tuple[str, Sequence[str]]], how: str | None = None, names: Sequence[str] = ()
    ) -> list[list[float]]:
        """Returns the scores of the steps of solutions of any problems, as `score_steps` does.

        Args:
            candidates: Pairs of a prompt and the steps of a solution.
            how: Name of the score: `ratio`, or None for the kind's own.
            names: Name of each candidate in error messages; empty: they are numbered.

        Raises:
            ConfigError, CheckpointError, DataError: As `score`.
        """
        how = self.check_step_score(how)
        called = names or [f"candidate {number}" for number in range(1, len(candidates) + 1)]
        encoded = [
            encode_steps(self.tokenizer, prompt, steps, name)
            for (prompt, steps), name in zip(candidates, called, strict=True)
        ]
        if not encoded:
            return []
        found = self._tokens([example for example, _ in encoded], how or self._kind.scores[0])
        beta = self.beta if how == "ratio" else None
        return [
            step_scores(tokens, ends, probabilities=self._kind.probabilities, beta=beta)
            for tokens, (_, ends) in zip(found, encoded, strict=True)
        ]

    def check_score(self, how: str | None) -> str:
        """Returns the name of the score, `default_score` for None.

        Raises:
            ConfigError: This verifier has no such score, or no reference for `ratio`.
        """
        how = self.default_score if how is None else how
        if how not in self._kind.scores:
            raise ConfigError(
                f"score: got {how!r}, but {self.directory}, a verifier of kind {self.kind}, scores by "
                f"{', '.join(self._kind.scores)}"
            )
        if how == "ratio" and not self._description.get("reference") and self._reference_path is None:
            raise ConfigError(
                f"score: got ratio, but {self.directory} is a plain model without a reference; needs sum or mean, or "
                "Verifier(..., reference=PATH)"
            )
        return how

    def check_step_score(self, how: str | None) -> str | None:
        """Returns the name of the score of steps, `ratio` or None.

        Raises:
            ConfigError: This verifier cannot score steps that way.
        """
        if how not in (None, "ratio"):
            raise ConfigError(
                f"score: got {how!r}, but steps are scored by ratio, or as each kind of verifier does (None)"
            )
        return None if how is None else self.check_score(how)

    def check_tokenizer(self, fingerprint: str | Mapping[str, Any], source: str) -> None:
        """Refuses solutions that were made with another tokenizer.

        Args:
            fingerprint: `tokenizer_fingerprint` of the solutions' tokenizer, or the `sha256` in it.
            source: Name of the solutions in the error message.

        Raises:
            ConfigError: The tokenizers differ; the message names both.
        """
        wanted = fingerprint if isinstance(fingerprint, str) else str(fingerprint.get("sha256"))
        own = tokenizer_fingerprint(self.tokenizer)["sha256"]
        if wanted != own:
            raise ConfigError(
                f"{source}: made for another tokenizer ({wanted[:12]}) than that of the verifier {self.directory} "
                f"({own[:12]}); use a verifier that was trained for their model"
            )

    @property
    def logarithmic(self) -> bool:
        """Whether scores are log-likelihoods in nats; otherwise they are probabilities."""
        return not self._kind.probabilities

    def _tokens(self, examples: Sequence[Example], how: str) -> list[Tensor]:
        """Returns for each example one number per completion token, which its score is computed from."""
        longest = max(map(len, examples))
        rows = max(1, self._batch_tokens // longest)
        found = self._token_scores(examples, longest, rows)
        if how == "ratio":
            of_reference = token_logprobs(self._reference(), examples, longest, rows)
            return [own - other for own, other in zip(found, of_reference, strict=True)]
        return found

    def _reference(self) -> QuietStarForCausalLM:
        if self._loaded_reference is None:
            recorded = self._description.get("reference") or {}
            path = os.fspath(self._reference_path or recorded["path"])
            if self._reference_path is None and not Path(path).is_dir():  # a file's own words are not asked of the hub
                raise CheckpointError(
                    f"{self.directory}: the reference of its log-ratio can't be loaded ({path} is not a directory); "
                    "score by sum or mean, or say where it is now: Verifier(..., reference=PATH), --reference PATH"
                )
            try:
                model, _ = load_policy(path, recorded.get("dtype"), device=self._device)
            except ConfigError as error:
                raise CheckpointError(
                    f"{self.directory}: the reference of its log-ratio can't be loaded ({error}); score by sum or "
                    "mean, or say where it is now: Verifier(..., reference=PATH), --reference PATH"
                ) from None
            if recorded and base_fingerprint(model) != recorded["fingerprint"]:
                raise CheckpointError(
                    f"{self.directory}: {path} is not the reference of its training, its weights are other ones"
                )
            nn.Module.to(model, self._policy.dtype)  # transformers' own is untyped
            self._loaded_reference = model
        return self._loaded_reference


def _of_tokens(tokens: Tensor, how: str) -> float:
    if how == "last":
        return float(tokens[-1])
    return float(tokens.mean() if how == "mean" else tokens.sum())
