"""Fine-tuning: the loss covers completions alone, packed rows are what examples are alone, and the base is the base."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from quietstar.config.loops import GeneratorOptions
from quietstar.config.training import FinetuningOptions, TrainingOptions
from quietstar.data.batches import Batch, IndexedBatches
from quietstar.data.examples import Example, encode_example, pack_examples
from quietstar.errors import CheckpointError
from quietstar.model.loading import character_tokenizer, load_causal_lm, small_llama, weights_sha256
from quietstar.model.modeling import QuietStarForCausalLM
from quietstar.outer_loop.finetune import fine_tune
from quietstar.training.step_functions import IGNORE, language_modeling_step, token_nll

SYMBOLS = "0123456789+=: ,\nCQA#"
TEXTS = [
    ("Q: 29+37\nA:", " 9+7, C: 1\n2+3, C: 0\n# 66"),  # all of it is learned, and not what follows the last colon alone
    ("Q: 1+1\nA:", " 2"),
    ("Q: 4+4\nA:", ""),
    ("Q", ": : :"),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer(SYMBOLS, "$")


@pytest.fixture(scope="module")
def directory(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory."""
    path = tmp_path_factory.mktemp("base")
    model = small_llama(0, len(tokenizer), layers=2, hidden_size=16, intermediate_size=24, heads=2, context=64)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def examples(tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    return [encode_example(tokenizer, prompt, completion) for prompt, completion in TEXTS]


def batch_of(examples: list[Example], length: int) -> Batch:
    """All examples, as a trainer gets them."""
    rows = pack_examples(examples, length)
    return IndexedBatches(rows.tokens, len(rows), 0, rows.attention_mask, loss_mask=rows.loss_mask).batch(1)


def loaded(directory: Path) -> QuietStarForCausalLM:
    return QuietStarForCausalLM.from_base(directory, dtype=torch.float64, start_text=[0], end_text=[0])


def plain_loss(model: nn.Module, examples: list[Example]) -> Tensor:
    """By transformers, each example alone and its prompt without labels."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for example in examples:
        tokens = torch.tensor([example.tokens])
        labels = tokens.clone()
        labels[:, : example.prompt_length] = IGNORE
        output = model(input_ids=tokens, labels=labels)
        loss = cross_entropy(output.logits[0, :-1], labels[0, 1:], ignore_index=IGNORE)
        torch.testing.assert_close(loss.float(), output.loss)  # transformers rounds it to float32
        learned = len(example) - example.prompt_length
        total = total + loss * learned
        count += learned
    return total / count


@pytest.mark.parametrize("length", [45, 64, 128])
def test_loss_and_gradient_are_those_of_completions_alone(
    directory: Path, examples: list[Example], length: int
) -> None:
    model, plain = loaded(directory), LlamaForCausalLM.from_pretrained(directory, dtype=torch.float64)
    batch = batch_of(examples, length)
    assert batch.attention_mask is not None and len(batch) < len(examples)  # some share a row
    expected = plain_loss(plain, examples)
    expected.backward()
    loss = language_modeling_step(model, batch, 0).loss
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-12, atol=0)
    gradients = dict(model.base.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-9, atol=1e-12)


def test_the_loss_covers_exactly_completions_and_their_ends(
    directory: Path, tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> None:
    """What has a loss, read as text."""
    batch = batch_of(examples, 128)
    counted = token_nll(loaded(directory), batch) > 0
    assert batch.loss_mask is not None and torch.equal(counted, batch.loss_mask[:, 1:])
    learned = tokenizer.decode(batch.tokens[:, 1:][counted])
    assert learned == "".join(f"{completion}$" for _, completion in TEXTS)


def run(directory: Path, tokenizer: PreTrainedTokenizerFast, out: Path, sha256: str) -> dict[str, object]:
    examples = [encode_example(tokenizer, prompt, completion) for prompt, completion in TEXTS]
    training = TrainingOptions(
        batch_size=2, learning_rate=1e-2, warmup_steps=0, device="cpu", save_every=0, report=False, threads=1
    )
    options = GeneratorOptions()
    return fine_tune(
        directory,
        sha256,
        tokenizer,
        examples,
        64,
        lambda rows: 2 * rows,
        options,
        FinetuningOptions(),
        training,
        out,
        "",
    )


def test_it_starts_from_the_base_alone(directory: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    base = load_causal_lm(directory, torch.float32)
    found = run(directory, tokenizer, tmp_path / "a", weights_sha256(base))
    assert found["base_sha256"] == weights_sha256(base) != found["model_sha256"]
    assert found["rows"] == 2 and found["steps"] == 4
    assert weights_sha256(load_causal_lm(tmp_path / "a/model", torch.float32)) == found["model_sha256"]
    assert run(directory, tokenizer, tmp_path / "b", weights_sha256(base)) == found

    other = tmp_path / "other"
    shutil.copytree(directory, other)
    with torch.no_grad():
        base.get_input_embeddings().weight[3, 5] += 1e-6
    base.save_pretrained(other)
    with pytest.raises(CheckpointError, match=r"other: its weights have changed since the run began .*same base"):
        run(other, tokenizer, tmp_path / "c", str(found["base_sha256"]))
    assert not (tmp_path / "c").exists()


def test_the_hash_of_weights(tmp_path: Path) -> None:
    def tied(seed: int) -> LlamaForCausalLM:
        model = small_llama(seed, 20, layers=1, hidden_size=16, intermediate_size=24, heads=2)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        return model

    model = tied(0)
    before = weights_sha256(model)
    assert before == weights_sha256(tied(0)) != weights_sha256(tied(1))
    model.save_pretrained(tmp_path)
    assert weights_sha256(load_causal_lm(tmp_path, torch.float32)) == before
    assert weights_sha256(load_causal_lm(tmp_path, torch.bfloat16)) != before
    assert weights_sha256(model.bfloat16()) == weights_sha256(load_causal_lm(tmp_path, torch.bfloat16))
