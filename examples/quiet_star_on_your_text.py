"""Quiet-STaR on a text of your own, in a training loop of your own.

    python examples/quiet_star_on_your_text.py my-text.txt path/or/hub-name

Without a model it makes a small one for the text; without a text it reads this repository's licence. The last tenth
of the text is held out. About 20 seconds on a CPU. `python -m quietstar.train` does this with everything around it.
"""

import sys
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import quietstar

LENGTH, BATCH, STEPS = 64, 4, 60
torch.manual_seed(0)


def small_model(text):
    """A tokenizer of 400 byte pairs and a Llama with two layers, both made for the text."""
    pairs = ByteLevelBPETokenizer()
    pairs.train_from_iterator([text], vocab_size=400, show_progress=False)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=400, bos_token_id=None, eos_token_id=None, **sizes)
    return AutoModelForCausalLM.from_config(config), PreTrainedTokenizerFast(tokenizer_object=pairs._tokenizer)


@torch.no_grad()
def held_out_nll(model, ids):
    """Nats a token, without and with thoughts; the same thoughts every time."""
    step = quietstar.learn(model, ids, seed=0)
    return float(step.base_loss), float(step.talk_loss)


text = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")
if len(sys.argv) > 2:
    base, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[2]), AutoTokenizer.from_pretrained(sys.argv[2])
else:
    base, tokenizer = small_model(text)
model = quietstar.QuietStarForCausalLM.from_base(base, tokenizer, thought_length=4, lookahead=2)
ids = torch.tensor(tokenizer(text)["input_ids"])
rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
held_out = max(1, len(rows) // 10)
train, test = rows[:-held_out], rows[-held_out:]

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if len(sys.argv) < 3 else 1e-5)
print("step 0: {:.3f} nats a token without, {:.3f} with thoughts".format(*held_out_nll(model, test)))
for step in range(1, STEPS + 1):
    output = quietstar.learn(model, train[torch.randint(len(train), (BATCH,))], objective="default", seed=step)
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print("step {}: {:.3f} nats a token without, {:.3f} with thoughts".format(step, *held_out_nll(model, test)))
prompt = tokenizer(text[:40], return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=16, think="always")[0]))
