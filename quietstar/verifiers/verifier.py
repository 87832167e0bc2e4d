"""`Verifier`: a model that says how good solutions are, loaded from its directory and used by itself."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quietstar.config.options import resolve_device
from quietstar.data.examples import Example, encode_example
from quietstar.data.tokenizer import tokenizer_fingerprint
from quietstar.errors import CheckpointError, ConfigError
from quietstar.model.adapters import base_fingerprint
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.verifiers.dpo import DPO, LIKELIHOOD
from quietstar.verifiers.outcome_reward import ORM, encode_steps, step_scores
from quietstar.verifiers.pairs import token_logprobs
from quietstar.verifiers.training import VERIFIER, Kind, load_policy, read_description

KINDS: dict[str, Kind] = {"dpo": DPO, "likelihood": LIKELIHOOD, "orm": ORM}
"""By the name that `verifier.json` and a run's directories know a kind by. V-STaR's verifier is the first one, and the
others are what it is compared with."""

PLAIN = "likelihood"
"""What a model directory without `verifier.json` is."""


class Verifier:
    """Scores solutions of a problem: the higher, the better.

    A model of V-STaR (kind `dpo`) or of its control without negatives (`likelihood`, as any plain model directory)
    scores by log-probability: the `sum` over the solution's tokens (the paper's), their `mean`, or the `ratio`: the sum
    less that of the reference. An outcome reward model (`orm`) scores by the probability that the solution is right:
    after its `last` token, or the `mean` over its tokens.

    Args:
        directory: Of a verifier, or any directory or hub name of a causal language model.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: Of the weights, such as `float32`; None: as they were saved.
        reference: Where the reference of `ratio` lies now; None: where it was when the verifier was trained.
        batch_tokens: Tokens at once, about; one solution at least.

    Attributes:
        kind: See above.
        default_score: What it scores by unless told otherwise.
        beta: Of its DPO loss.
        fingerprint: Hash of what it says, to tell verifiers apart.

    Raises:
        ConfigError: It cannot be loaded.
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
        described = (Path(directory) / VERIFIER).is_file()
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
        """The scores of solutions of one problem.

        Args:
            prompt: As the generator was asked, without a hint.
            solutions: What it wrote, without the end-of-sequence token.
            how: What to score by, see above; None: `default_score`.

        Raises:
            ConfigError: The kind of verifier has no such score.
            CheckpointError: The reference of `ratio` is gone or another model.
            DataError: A prompt has no tokens, or a solution does not fit the model's context.
        """
        return self.score_many([(prompt, solution) for solution in solutions], how)

    def score_many(
        self, candidates: Sequence[tuple[str, str]], how: str | None = None, names: Sequence[str] = ()
    ) -> list[float]:
        """The scores of solutions of any problems.

        Args:
            candidates: (prompt, solution) each.
            how: As for `score`.
            names: What each is called in messages.

        Raises:
            ConfigError, CheckpointError, DataError: As `score`.
        """
        how = self.check_score(how)
        return self.scores(candidates, [how], names)[how]

    def scores(
        self, candidates: Sequence[tuple[str, str]], hows: Sequence[str], names: Sequence[str] = ()
    ) -> dict[str, list[float]]:
        """Several scores of solutions at the cost of one; with `ratio` among them, at that of one more.

        Args:
            candidates, names: As for `score_many`.
            hows: What to score by.

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
        """A score between 0 and 1 for each step of a solution, from one forward pass; see `process_score`.

        Of an outcome reward model it is the probability after the step's last token. Of the others it is the
        geometric mean of the probabilities of the step's own tokens; or, by `ratio`, sigmoid(beta * log-ratio) of the
        solution up to there: how probably it is preferred to one that the reference likes as much as the verifier
        does. A step without tokens of its own has the score of the one before it (of the first: 1 or 1/2).

        Args:
            prompt: As for `score`.
            steps: Joined, they are the solution.
            how: `ratio`, or None.

        Raises:
            ConfigError, CheckpointError, DataError: As `score`.
        """
        return self.score_steps_many([(prompt, steps)], how)[0]

    def score_steps_many(
        self, candidates: Sequence[tuple[str, Sequence[str]]], how: str | None = None, names: Sequence[str] = ()
    ) -> list[list[float]]:
        """The same of solutions of any problems.

        Args:
            candidates: (prompt, steps) each.
            how: As for `score_steps`.
            names: What each is called in messages.

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
        """What to score by, where this verifier can.

        Raises:
            ConfigError: It cannot.
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
        """What to score steps by, where this verifier can.

        Raises:
            ConfigError: It cannot.
        """
        if how not in (None, "ratio"):
            raise ConfigError(
                f"score: got {how!r}, but steps are scored by ratio, or as each kind of verifier does (None)"
            )
        return None if how is None else self.check_score(how)

    def check_tokenizer(self, fingerprint: str | Mapping[str, Any], source: str) -> None:
        """Refuses solutions that were made for another tokenizer.

        Args:
            fingerprint: `tokenizer_fingerprint` of theirs, or its `sha256`.
            source: What they are called in the message.

        Raises:
            ConfigError: Naming both.
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
        """Whether scores are log-likelihoods, and not probabilities."""
        return not self._kind.probabilities

    def _tokens(self, examples: Sequence[Example], how: str) -> list[Tensor]:
        """What each example's score is made from, by completion token."""
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
