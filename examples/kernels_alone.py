"""The kernels without a model: each against the same computation in plain PyTorch, values and gradients.

`backend="auto"` is Triton for 16-bit tensors on a CUDA device and structured PyTorch elsewhere. A few seconds on a CPU.
"""

import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from quietstar_kernels import linear_cross_entropy, mixed_cross_entropy, sample_tokens, thought_attention

torch.manual_seed(0)


def largest_difference(ours, plain, inputs):
    """Of the results, and of the gradients with respect to the inputs."""
    upstream = torch.randn_like(ours)
    pairs = [(ours, plain)]
    pairs += zip(*(torch.autograd.grad(out, inputs, upstream) for out in (ours, plain)), strict=True)
    return max(float((a - b).abs().max().detach()) for a, b in pairs)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


# Streams of 4 tokens hang from every second position of a text: each sees the text up to there, and itself.
texts, length, tokens, heads, size = 2, 32, 4, 4, 16
anchor = torch.arange(0, length, 2)
q, k_own, v_own = (leaf(texts, len(anchor), tokens, heads, size) for _ in range(3))
k_text, v_text = leaf(texts, length, heads, size), leaf(texts, length, heads, size)
ours = thought_attention(q, k_text, v_text, k_own, v_own, anchor)
streams = []
for place, last in enumerate(anchor.tolist()):  # plain: one stream at a time, the text before it copied
    k = torch.cat([k_text[:, : last + 1], k_own[:, place]], 1).transpose(1, 2)
    v = torch.cat([v_text[:, : last + 1], v_own[:, place]], 1).transpose(1, 2)
    visible = torch.ones(tokens, last + 1 + tokens, dtype=torch.bool).tril(last + 1)
    streams.append(scaled_dot_product_attention(q[:, place].transpose(1, 2), k, v, visible).transpose(1, 2))
worst = [largest_difference(ours, torch.stack(streams, 1), (q, k_text, v_text, k_own, v_own))]

# The loss after the mixing head, and of one hidden state, without [N, V] logits.
base, thought, weight, lm_head, target = leaf(48, 32), leaf(48, 32), leaf(48), leaf(100, 32), torch.randint(100, (48,))
ours = mixed_cross_entropy(base, thought, weight, lm_head, target)
mixed = (1 - weight[:, None]) * base + weight[:, None] * thought
plain = cross_entropy(mixed @ lm_head.T, target, reduction="none")
worst.append(largest_difference(ours, plain, (base, thought, weight, lm_head)))
ours = linear_cross_entropy(base, lm_head, target)
worst.append(largest_difference(ours, cross_entropy(base @ lm_head.T, target, reduction="none"), (base, lm_head)))

token, logprob = sample_tokens(base.detach(), lm_head.detach(), seed=0)
plain = -cross_entropy((base @ lm_head.T).detach(), token, reduction="none")
worst.append(float((logprob - plain).abs().max()))

names = ("thought_attention", "mixed_cross_entropy", "linear_cross_entropy", "sample_tokens")
print("largest difference from plain PyTorch, values and gradients:")
for name, difference in zip(names, worst, strict=True):
    print(f"  {name:22}{difference:.1e}")
assert max(worst) < 1e-4
