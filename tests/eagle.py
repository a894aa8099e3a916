"""Tiny models with an EAGLE-3 head, and that head's forward written out from an export's files."""

import json

import torch
from helpers import tiny_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mtp.modeling.heads import HeadConfig
from mtp.modeling.modeling_mtp import family_class


def eagle_model(family="llama", *, drafts=None, seed=0, width=32, tied=False, options=None, **head):
    """A random model of four layers; drafts: token ids of its draft vocabulary, None for all."""
    torch.manual_seed(seed)
    cls = family_class(family)
    config = tiny_config(cls, 4, tied)
    options = {**(options or {}), **({"draft_vocab_size": len(drafts)} if drafts else {})}
    settings = {"type": "eagle3", "num_slots": 3, "hidden_size": width, "intermediate_size": 24}
    config.mtp = HeadConfig(**{**settings, "options": options, **head}).to_checkpoint()
    model = cls(config).eval()
    if drafts:
        model.mtp_head.set_draft_tokens(drafts)
    return model


def plain_logits(folder, hidden, embed, text, block):
    """[K, W] logits of the slots after `text`, from an export's two files alone.

    hidden [T, taps * D]: main's hidden states that config.json names; embed [V, H]: embeddings;
    text: T token ids; block: t_0..t_{K-1}. Each slot reads the whole text again.
    """
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config = config.get("transformer_layer_config", config)
    layer = "layers.0." if "layers.0.hidden_norm.weight" in weights else "midlayer."
    num_heads, theta = config["num_attention_heads"], config["rope_parameters"]["rope_theta"]

    def norm(x, name):
        scale = (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt()
        return x * scale * weights[f"{name}.weight"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T

    def heads(x):
        return x.unflatten(-1, (num_heads, -1)).transpose(0, 1)  # [heads, n, d]

    def rotate(x):
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[1])[:, None] * theta ** -(torch.arange(half) / half)
        a, b = x.split(half, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    features, following, rows = linear(hidden, "fc"), [*text[1:], *block], []
    for slot in range(len(block)):
        embeds = embed[following[: len(text) + slot]]
        pairs = torch.cat(
            [norm(embeds, f"{layer}input_layernorm"), norm(features, f"{layer}hidden_norm")], -1
        )
        q, k, v = (heads(linear(pairs, f"{layer}self_attn.{name}_proj")) for name in "qkv")
        scores = rotate(q) @ rotate(k).transpose(1, 2) * q.shape[-1] ** -0.5
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        x = features + linear(mixed.transpose(0, 1).flatten(1), f"{layer}self_attn.o_proj")
        inner = norm(x, f"{layer}post_attention_layernorm")
        gate = torch.nn.functional.silu(linear(inner, f"{layer}mlp.gate_proj"))
        x = x + linear(gate * linear(inner, f"{layer}mlp.up_proj"), f"{layer}mlp.down_proj")
        rows.append(linear(norm(x[-1], "norm"), "lm_head"))
        features = torch.cat([features, x[-1:]])
    return torch.stack(rows)


@torch.no_grad()
def logits_of_head(model, text, block):
    """[K, W] logits of the rows of the head's output layer after a text."""
    tokens, anchor = torch.tensor([text]), torch.tensor([len(text) - 1])
    rows = model.replay(tokens, anchor, torch.tensor([block]))
    return rows.head_output.row_logits(rows.head_hidden[0])


@torch.no_grad()
def states_of_main(folder, layers, text):
    """[T, taps * D] hidden states of main as it is exported, and its embeddings."""
    main = AutoModelForCausalLM.from_pretrained(folder)
    hidden = main(torch.tensor([text]), output_hidden_states=True).hidden_states
    return torch.cat([hidden[layer][0] for layer in layers], -1), main.get_input_embeddings().weight
