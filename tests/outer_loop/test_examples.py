"""Prompts with completions as tokens: what is learned is exactly what a model would write."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from quietstar.data.examples import Example, encode_example, pack_examples
from quietstar.data.tokenizer import encode_prompt
from quietstar.errors import ConfigError, DataError
from quietstar.model.loading import character_tokenizer
from quietstar.tasks.addition import LOCAL_CHARACTERS
from tests.data.conftest import byte_tokenizer, mistral_directory, mistral_tokenizer

__all__ = ["byte_tokenizer", "mistral_directory", "mistral_tokenizer"]  # fixtures

TEXTS = [
    ("Q: What is 3 + 4?\nA:", " 3 + 4: that is 7.\n#### 7"),
    ("Q: What is 3 + 4?\nA:", "\n7"),
    ("Q: What is 3 + 4?\nA: ", "7: seven"),
    ("Q: Which word?\nA: ", "yes"),
    ("Input:\n2 9 8 + 3 7 6\nTarget:\n", "<scratch>\n2 9 8 + 3 7 6 , C: 0\n8 C: 0\n</scratch>\n6 7 4"),
    ("The word is straw", "berry, which has three r's"),
    ("ends in two spaces  ", "  and begins with two"),
    ("caf\u00e9 \U0001f600", "\U0001f600 \u2028 na\u00efve"),
    ("only", ""),
]


@pytest.mark.parametrize("fixture", ["byte_tokenizer", "mistral_tokenizer"])
@pytest.mark.parametrize("text", TEXTS, ids=[repr(prompt[-12:] + "|" + rest[:8]) for prompt, rest in TEXTS])
def test_an_example_is_its_prompt_its_completion_and_an_end(
    fixture: str, text: tuple[str, str], request: pytest.FixtureRequest
) -> None:
    tokenizer: PreTrainedTokenizerBase = request.getfixturevalue(fixture)
    if tokenizer.eos_token_id is None:
        tokenizer.add_special_tokens({"eos_token": "<end>"})
    prompt, completion = text
    example = encode_example(tokenizer, prompt, completion)
    assert list(example.tokens[: example.prompt_length]) == encode_prompt(tokenizer, prompt)
    assert example.tokens[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in example.tokens[:-1]
    decoded = tokenizer.decode(example.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert decoded == prompt + completion


def test_characters() -> None:
    tokenizer = character_tokenizer(LOCAL_CHARACTERS, "$")
    example = encode_example(tokenizer, "3+4=", "3+4+0=70;>7.", "here")
    assert example == Example((*(LOCAL_CHARACTERS.index(c) for c in "3+4=3+4+0=70;>7."), 17), 4, "here")


def test_a_tokenizer_that_ends_every_text() -> None:
    """Such as T5's: the end belongs behind the completion, and nowhere else."""
    own = character_tokenizer(LOCAL_CHARACTERS, "[END]").backend_tokenizer
    own.post_processor = TemplateProcessing(single="$A [END]", special_tokens=[("[END]", 17)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="[END]")
    assert tokenizer("3+4=")["input_ids"][-1] == 17
    assert encode_example(tokenizer, "3+4=", "7.").tokens == (3, 10, 4, 11, 7, 16, 17)


def test_what_cannot_be_an_example() -> None:
    with pytest.raises(ConfigError, match=r"model\.path: the tokenizer has no end-of-sequence token"):
        encode_example(character_tokenizer(LOCAL_CHARACTERS), "1", "2")
    tokenizer: PreTrainedTokenizerFast = character_tokenizer(LOCAL_CHARACTERS, "$")
    with pytest.raises(DataError, match="problem 7: the prompt has no tokens"):
        encode_example(tokenizer, "", "2", "problem 7")


def test_rows() -> None:
    examples = [Example((1, 2, 3), 1), Example((4, 5), 1), Example((6, 7, 8, 9), 2), Example((1, 1), 1)]
    rows = pack_examples(examples, 6)
    assert rows.order == ((0, 1), (2, 3))
    assert rows.tokens.tolist() == [[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 1, 1]]
    assert rows.attention_mask.tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 2, 2]]
    assert rows.loss_mask.long().tolist() == [[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 0, 1]]
    with pytest.raises(DataError, match="problem 3: 4 tokens, but a row has 3"):
        pack_examples([Example((1, 2, 3, 4), 1, "problem 3")], 3)
    with pytest.raises(DataError, match="got none"):
        pack_examples([], 3)


def test_a_character_that_the_tokenizer_does_not_know() -> None:
    with pytest.raises(DataError, match="the tokenizer cannot encode '2\\+x='"):
        encode_prompt(character_tokenizer(LOCAL_CHARACTERS, "$"), "2+x=")
