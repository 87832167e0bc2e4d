"""The thought viewer: what a model thought at each token of a text, and what that gained, as a page and as JSON.

`thoughts.json`, version 1. Probabilities are rounded to 3 significant digits, all other numbers to 4 decimals; one that
is not finite is null. Log-probabilities are in nats. A token is the one that is predicted: its thoughts hang from the
position before it.

    version         1
    title           name of the page
    model           name (no path), family of the base, vocabulary, thought_length, lookahead J, interpolation,
                    thinking ("sample" or "pause")
    settings        thoughts K, top_k, temperature (null: greedy), seed, positions, tokens (at most so many), window and
                    overlap (tokens), training_length or null, device, dtype
    environment     python, packages (version by name), git (commit and whether it was dirty, or null)
    text.name       of the file
    text.cut        whether the file goes on after the last token
    text.tokens     [N] token ids
    text.pieces     {index: text} of tokens that end a character which others began; all else is in the vocabulary
    vocabulary      {id: text} of every id in the file; a list of bytes where the token alone is no whole character
    positions       one object for each token that was thought about, in the order of the text:
      token         its index in the text, from 1
      base          [J] log-probabilities without thought of the tokens token .. token + J - 1, fewer at the end
      before        [top_k] pairs of id and probability without thought, the most probable first
      mean          the same of the mean over the thoughts; only where K is more than 1
      thoughts      [K] objects: tokens [T] (null for pauses), logprob of the thought at its temperature,
                    weight w of the thought in the prediction of `token`, talk [J] log-probabilities of the same tokens
                    as in `base`, reward: sum over J of talk - base, advantage: reward less the mean of the position's
                    (null for one thought), after: as `before`, with this thought mixed in

The gain at a token is the mean over its thoughts of talk[0] - base[0].
"""

from typing import TYPE_CHECKING

from quietstar.lazy_names import lazy_names

if TYPE_CHECKING:
    from quietstar.data.text_file import read_text
    from quietstar.reporting.viewer.document import VERSION, thoughts_of, write_page, write_view
    from quietstar.reporting.viewer.options import ViewOptions

__all__ = ["VERSION", "ViewOptions", "read_text", "thoughts_of", "write_page", "write_view"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "quietstar.data.text_file": ("read_text",),
        "quietstar.reporting.viewer.document": ("VERSION", "thoughts_of", "write_page", "write_view"),
        "quietstar.reporting.viewer.options": ("ViewOptions",),
    },
)
