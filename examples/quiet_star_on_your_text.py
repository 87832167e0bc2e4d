"""Quiet-STaR on a text of your own, in a training loop of your own.

    python examples/quiet_star_on_your_text.py my-text.txt path/or/hub-name

Without a model it makes a small one for the text; without a text it reads this repository's licence. The last tenth of
the text, which needs 500 tokens, is held out. About 20 seconds on a CPU. It runs no control, so it does not show how
much of a gain is due to what the thoughts say. `python -m quietstar.train` does this with everything around it.
"""

import sys
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import quietstar

LENGTH, BATCH, STEPS = 48, 4, 60
torch.manual_seed(0)


def small_model(text):
    """A tokenizer of 400 byte pairs and a Llama with two layers, both made for the text."""
    pairs = ByteLevelBPETokenizer()
    pairs.train_from_iterator([text], vocab_size=400, show_progress=False)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=400, bos_token_id=None, eos_token_id=None, **sizes)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(pairs.to_str()))
    return AutoModelForCausalLM.from_config(config), tokenizer


@torch.no_grad()
def held_out_nll(model, ids):
    """Nats a token without and with thoughts, of the tokens that follow each thought."""
    step = quietstar.learn(model, ids, seed=0)
    return (float(nll[step.target_mask].mean()) for nll in (step.base_nll_at_target, step.talk_nll))


file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "LICENSE"
text = file.read_text(encoding="utf-8")
if len(sys.argv) > 2:
    base, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[2]), AutoTokenizer.from_pretrained(sys.argv[2])
else:
    base, tokenizer = small_model(text)
model = quietstar.QuietStarForCausalLM.from_base(base, tokenizer, thought_length=4, lookahead=2)
ids = torch.tensor(tokenizer(text)["input_ids"])
rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
train, test = rows.split([len(rows) - len(rows) // 10, len(rows) // 10])

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if len(sys.argv) < 3 else 1e-5)
print("step 0: {:.3f} nats a token without, {:.3f} with thoughts".format(*held_out_nll(model, test)))
for step in range(1, STEPS + 1):
    output = quietstar.learn(model, train[torch.randint(len(train), (BATCH,))], objective="default", seed=step)
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print("step {}: {:.3f} nats a token without, {:.3f} with thoughts".format(step, *held_out_nll(model, test)))
print(tokenizer.decode(model.generate(test[:1, :16], think="always", max_new_tokens=16)[0]))
