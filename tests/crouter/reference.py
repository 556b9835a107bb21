"""A slow, obvious crouter: one chunk at a time, float64, loops over heads and positions, no masks, no batching."""

import math

import torch


def rms_norm(x, weight=None, eps=1e-6):
    x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return x if weight is None else x * weight


def rotate(x, position, theta):
    half = x.shape[-1] // 2
    out = x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / x.shape[-1])
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
    return out


def attention(layer, x, positions, config):
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    w = layer.attention
    qkv = x @ w.qkv_proj.weight.T
    out = torch.zeros_like(x)
    for h in range(heads):
        parts = [qkv[:, p * config.hidden_size + h * size :][:, :size] for p in range(3)]
        q, k = (
            torch.stack(
                [rotate(rms_norm(row, norm), at, config.rope_theta) for row, at in zip(x, positions, strict=True)]
            )
            for x, norm in ((parts[0], w.q_norm.weight), (parts[1], w.k_norm.weight))
        )
        out[:, h * size : (h + 1) * size] = torch.softmax(q @ k.T / math.sqrt(size), -1) @ parts[2]
    return out @ w.o_proj.weight.T


def stack(layers, loops, x, positions, config):
    for _ in range(loops):
        for layer in layers:
            x = x + attention(layer, rms_norm(x, layer.attention_norm.weight), positions, config)
            gate, up = (rms_norm(x, layer.mlp_norm.weight) @ layer.mlp.gate_up_proj.weight.T).chunk(2, -1)
            x = x + (gate * torch.sigmoid(gate) * up) @ layer.mlp.down_proj.weight.T
    return x


def reference(model, tokens):
    """Latents, logits, mean loss (nats/token), that of each token and TRA of one chunk, given as a list of ids."""
    model, config = model.double(), model.config
    step = config.chunk_length / config.num_latents
    positions = [(i + 0.5) * step - 0.5 for i in range(config.num_latents)] + list(range(config.chunk_length))
    rows = [
        rms_norm(model.embed_tokens.weight[t], model.embed_norm.weight) @ model.embed_proj.weight.T for t in tokens
    ]
    rows += [model.pad_embedding] * (config.chunk_length - len(tokens))
    x = stack(model.encoder, config.num_encoder_loops, torch.cat([model.slots, torch.stack(rows)]), positions, config)
    z = rms_norm(rms_norm(x[: config.num_latents], model.latent_norm.weight) @ model.to_latent.weight.T)
    x = torch.cat([z @ model.from_latent.weight.T, model.decoder_input])
    x = stack(model.decoder, config.num_decoder_loops, x, positions, config)[config.num_latents :]
    logits = rms_norm(x, model.output_norm.weight) @ model.output_proj.weight.T @ model.embed_tokens.weight.T
    costs, hits = [], 0
    for position, token in enumerate(tokens):
        row = logits[position]
        costs.append(float(torch.logsumexp(row, 0) - row[token]))
        hits += int(row.argmax()) == token
    return z, logits[: len(tokens)], sum(costs) / len(costs), costs, hits / len(tokens)
