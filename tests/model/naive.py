"""The definition of a training step, slowly: each stream by itself through a plain transformers model.

Nothing of this project is used here but the weights: the base is a fresh model with transformers' own attention, and
the mixing, the losses and REINFORCE are written out.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from quietstar import QuietStarForCausalLM


@dataclass(frozen=True)
class NaiveStep:
    """B texts of L tokens, P streams, J lookahead tokens."""

    base_logits: Tensor  # [B, L, V]
    talk_logits: Tensor  # [B, P, J, V]; rows without a target are zero
    talk_nll: Tensor  # [B, P, J]
    loss: Tensor
    gradients: dict[str, Tensor]


class NaiveThinker(nn.Module):
    """A copy of a thinking model's weights around a plain base."""

    def __init__(self, model: QuietStarForCausalLM) -> None:
        super().__init__()
        config = copy.deepcopy(model.base.config)
        # transformers' scaled-dot-product attention leaves a soft cap out
        plain = "sdpa" if getattr(config, "attn_logit_softcapping", None) is None else "eager"
        self.base = AutoModelForCausalLM.from_config(config, attn_implementation=plain, dtype=model.dtype)
        self.base.load_state_dict(model.base.state_dict())
        assert self.base.config._attn_implementation == plain
        self.thought_embedding = nn.Embedding.from_pretrained(model.thought_embedding.weight.detach().clone())
        self.thought_embedding.weight.requires_grad_(True)
        self.mixing_head = nn.ModuleDict({"layers": copy.deepcopy(model.mixing_head.layers)})
        self.windows = layer_windows(self.base)
        self.eval()

    def run(self, embeds_1NE: Tensor, anchor: int, text: int) -> tuple[Tensor, Tensor]:
        """Logits [N, V] and final states [N, E] of `text` text tokens and the stream of `anchor` behind them.

        Args:
            embeds_1NE: Their embeddings.
            anchor: text - 1, or -1 for a text without stream.
            text: Number of text tokens.
        """
        count = embeds_1NE.shape[1]
        query, key = torch.arange(count)[:, None], torch.arange(count)[None, :]
        masks = {}
        for window in set(self.windows):
            visible = key <= query
            if window is not None:
                # A stream's window is measured from its anchor, and its own tokens are always in sight.
                from_anchor = query.clamp_max(text - 1) if anchor >= 0 else query
                visible = visible & ((from_anchor - key < window) | (key >= text))
            masks[window] = visible[None, None]
            if self.base.config._attn_implementation == "eager":  # adds its mask
                masks[window] = torch.zeros_like(masks[window], dtype=embeds_1NE.dtype).masked_fill(
                    ~visible, -torch.inf
                )
        handles = []
        if len(masks) > 1:  # transformers takes one mask for all layers; the layers that differ get their own
            for layer, window in zip(self.base.model.layers, self.windows, strict=True):

                def replace(_: nn.Module, args: tuple, kwargs: dict, mask: Tensor = masks[window]) -> tuple:
                    return args, {**kwargs, "attention_mask": mask}

                handles.append(layer.register_forward_pre_hook(replace, with_kwargs=True))
        output = self.base(
            inputs_embeds=embeds_1NE,
            attention_mask=masks[self.windows[0]],
            position_ids=torch.arange(count)[None],
            use_cache=False,
            output_hidden_states=True,
        )
        for handle in handles:
            handle.remove()
        return output.logits[0], output.hidden_states[-1][0]

    def step(
        self, ids_BL: Tensor, tokens_BPT: Tensor, anchor_BP: Tensor, lookahead: int, count: int, scale: float = 1.0
    ) -> NaiveStep:
        """0.5 base + 0.5 talk + 1.0 policy, with the leave-one-out baseline over `count` thoughts per position."""
        embed = self.base.get_input_embeddings()
        start, end = self.thought_embedding.weight[0] * scale, self.thought_embedding.weight[1] * scale
        (B, L), (_, P, T) = ids_BL.shape, tokens_BPT.shape
        all_base, all_talk = [], []
        base_nlls: list[Tensor] = []
        talk_nlls: list[list[Tensor]] = [[] for _ in range(lookahead)]
        policy: list[Tensor] = []
        nll_BPJ = torch.zeros(B, P, lookahead, dtype=start.dtype)
        for b in range(B):
            text_logits, text_states = self.run(embed(ids_BL[b : b + 1]), -1, L)
            all_base.append(text_logits)
            base_nll = cross_entropy(text_logits[:-1], ids_BL[b, 1:], reduction="none")
            base_nlls.append(base_nll)
            rewards, scores = [], []
            for p in range(P):
                i = int(anchor_BP[b, p])
                following = ids_BL[b, i + 1 : i + lookahead]
                stream = [start[None], embed(tokens_BPT[b, p]), end[None], embed(following)]
                embeds = torch.cat([embed(ids_BL[b, : i + 1]), *stream])[None]
                logits, states = self.run(embeds, i, i + 1)
                thought_logits = logits[i + 1 : i + 1 + T]
                scores.append(-cross_entropy(thought_logits, tokens_BPT[b, p], reduction="sum"))
                reward = torch.zeros((), dtype=start.dtype)
                mixed = torch.zeros(lookahead, text_logits.shape[1], dtype=start.dtype)
                for j in range(min(lookahead, L - 1 - i)):
                    after = i + 1 + T + 1 + j  # END and j true tokens
                    w = self.weight(text_states[i + j], states[after])
                    mixed[j] = w * logits[after] + (1 - w) * text_logits[i + j]
                    nll = cross_entropy(mixed[j][None], ids_BL[b, i + 1 + j][None])
                    talk_nlls[j].append(nll)
                    nll_BPJ[b, p, j] = nll.detach()
                    reward = reward + (base_nll[i + j] - nll).detach()
                all_talk.append(mixed)
                rewards.append(reward)
            for first in range(0, P, count):
                if int(anchor_BP[b, first]) >= L - 1:
                    continue
                for k in range(count):
                    others = [rewards[first + o] for o in range(count) if o != k]
                    advantage = rewards[first + k] - torch.stack(others).mean()
                    policy.append(-advantage * scores[first + k])
        loss = 0.5 * torch.cat(base_nlls).mean()
        loss = loss + 0.5 * torch.stack([torch.stack(nlls).mean() for nlls in talk_nlls]).mean()
        loss = loss + torch.stack(policy).mean()
        self.zero_grad()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}
        talk = torch.stack(all_talk).view(B, P, lookahead, -1)
        return NaiveStep(torch.stack(all_base).detach(), talk.detach(), nll_BPJ, loss.detach(), gradients)

    def weight(self, base_E: Tensor, thought_E: Tensor) -> Tensor:
        layers = self.mixing_head["layers"]
        output: Tensor = layers(torch.cat([base_E, thought_E]))[0]
        return output


def layer_windows(base: nn.Module) -> list[int | None]:
    """Each layer's sliding window, from the configuration alone."""
    config = base.config
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in types]
