"""A lean bf16 forward pass over the parameters of a stock LlavaForConditionalGeneration, for training on CPU.

On two cores with AMX the matrix products cost little; what costs is elementwise work. Against the stock modules under
autocast this pass keeps the residual stream in bf16, joins the q, k and v products, takes the softmax in bf16, and
packs many questions behind one image: queries of question tokens see the image and their own question, so no score
between two questions is ever computed. It is the same function: tests compare it with the stock forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 192  # image rows whose attention is computed at once


class _RMSNorm(torch.autograd.Function):
    """Llama's RMSNorm with a two-pass backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        rate = torch.rsqrt(square / x.shape[-1] + eps).to(x.dtype)
        normed = x * rate
        ctx.save_for_backward(normed, weight, rate)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, weight, rate = ctx.saved_tensors
        product = grad * normed
        grad_weight = product.sum(dim=tuple(range(grad.dim() - 1)), dtype=torch.float32).to(weight.dtype)
        mean = (product @ weight[:, None]) / grad.shape[-1]
        return (grad * weight).addcmul_(normed, mean, value=-1).mul_(rate), grad_weight, None


class _Rotary(torch.autograd.Function):
    """Rotate the last dimension by position: halves (a, b) -> (a cos - b sin, b cos + a sin)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out[..., half:]).addcmul_(a, sin)
    return out


def parameters_in(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's parameters cast to `dtype`; gradients flow back to the fp32 originals."""
    return {name: p.to(dtype) for name, p in model.named_parameters()}


def vision(params: dict[str, Tensor], config: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(features of `vision_feature_layer` without CLS [B, N, d], CLS after the last layer's norm [B, d])."""
    root = "model.vision_tower."
    eps, heads = config.layer_norm_eps, config.num_attention_heads
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], params[name + ".weight"], params[name + ".bias"], eps)  # noqa: E731
    linear = lambda x, name: F.linear(x, params[name + ".weight"], params[name + ".bias"])  # noqa: E731
    batch, channels, size = pixels.shape[:3]
    p = config.patch_size
    g = size // p
    kernel = params[root + "embeddings.patch_embedding.weight"]
    patches = pixels.reshape(batch, channels, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(batch, g * g, -1)
    x = F.linear(patches.to(kernel.dtype), kernel.flatten(1))
    cls = params[root + "embeddings.class_embedding"].expand(batch, 1, -1)
    x = torch.cat([cls, x], 1) + params[root + "embeddings.position_embedding.weight"]
    x = norm(x, root + "pre_layrnorm")
    features = x
    for index in range(config.num_hidden_layers):
        if index == config.num_hidden_layers - 1:
            features = x  # vision_feature_layer = -2 is the input of the last layer
        at = f"{root}encoder.layers.{index}."
        y = norm(x, at + "layer_norm1")
        names = [f"{at}self_attn.{part}_proj" for part in "qkv"]
        weight = torch.cat([params[n + ".weight"] for n in names])
        bias = torch.cat([params[n + ".bias"] for n in names])
        last = index == config.num_hidden_layers - 1  # of which only CLS is read
        q, k, v = F.linear(y, weight, bias).view(batch, -1, 3, heads, weight.shape[1] // heads).permute(2, 0, 3, 1, 4)
        if last:
            q, x = q[:, :, :1], x[:, :1]
        attention = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), -1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), at + "self_attn.out_proj")
        y = linear(norm(x, at + "layer_norm2"), at + "mlp.fc1")
        x = x + linear(F.gelu(y), at + "mlp.fc2")
    return features[:, 1:], norm(x[:, 0], root + "post_layernorm")


def project(params: dict[str, Tensor], features: Tensor) -> Tensor:
    """LLaVA's two-layer projector."""
    at = "model.multi_modal_projector.linear_"
    hidden = F.gelu(F.linear(features, params[at + "1.weight"], params[at + "1.bias"]))
    return F.linear(hidden, params[at + "2.weight"], params[at + "2.bias"])


def language(
    params: dict[str, Tensor],
    config: Any,
    image: Tensor,
    bos: int,
    questions: Tensor,
    barred: Tensor | None = None,
    image_states: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Run the LM on `<bos> image` followed by Q questions of equal slot length, each continuing from the image alone.

    image [B, N, d] (projected), questions int [B, Q, T] (right-padded), barred [B, Q * T, N + 1] is added to the
    questions' scores over `<bos> image` (training only). Returns the final normed states of the question
    tokens [B, Q, T, d] and, per layer, their residual stream after it. `image_states` collects the same of
    `<bos> image` for every layer but the last.
    """
    root = "model.language_model."
    batch, count, length = questions.shape
    prefix = image.shape[1] + 1
    table = params[root + "embed_tokens.weight"]
    x = torch.cat([table[bos].expand(batch, 1, -1), image, F.embedding(questions.flatten(1), table)], 1)
    position = torch.cat([torch.arange(prefix), torch.arange(prefix, prefix + length).repeat(count)])
    theta = config.rope_parameters["rope_theta"]
    heads, width = config.num_attention_heads, config.head_dim
    angle = position[:, None].float() / theta ** (torch.arange(0, width, 2).float() / width)
    # [S, 2 heads, width / 2]: the query half carries the softmax scale, so that no pass is spent on it.
    scale = torch.tensor([width**-0.5] * heads + [1.0] * heads)[:, None]
    cos, sin = ((t[:, None] * scale).to(x.dtype) for t in (angle.cos(), angle.sin()))
    most = max(prefix, length)  # few image tokens may be fewer than those of a question
    future = torch.full((most, most), float("-inf"), dtype=x.dtype).triu(1)
    sizes = (prefix, count * length)
    states = []
    for index in range(config.num_hidden_layers):
        last = index == config.num_hidden_layers - 1  # where nothing reads the image tokens' outputs
        at = f"{root}layers.{index}."
        y = _RMSNorm.apply(x, params[at + "input_layernorm.weight"], config.rms_norm_eps)
        weight = torch.cat([params[f"{at}self_attn.{part}_proj.weight"] for part in "qkv"])
        qk, v = F.linear(y, weight).view(batch, -1, 3 * heads, width).split((2 * heads, heads), 2)
        q, k = _Rotary.apply(qk, cos, sin).transpose(1, 2).split(heads, 1)
        mixed = _packed_attention(q, k, v.transpose(1, 2), sizes, count, future, barred, last)
        if last:
            x = x.split(sizes, 1)[1]
        x = x + F.linear(mixed.transpose(1, 2).flatten(2), params[at + "self_attn.o_proj.weight"])
        y = _RMSNorm.apply(x, params[at + "post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = F.linear(y, params[at + "mlp.gate_proj.weight"]), F.linear(y, params[at + "mlp.up_proj.weight"])
        x = x + F.linear(F.silu(gate) * up, params[at + "mlp.down_proj.weight"])
        if image_states is not None and not last:
            image_states.append(x.split(sizes, 1)[0])
        states.append((x if last else x.split(sizes, 1)[1]).unflatten(1, (count, length)))
    return _RMSNorm.apply(states[-1], params[root + "norm.weight"], config.rms_norm_eps), states


def _packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: tuple[int, int],
    count: int,
    future: Tensor,
    barred: Tensor | None,
    last: bool,
) -> Tensor:
    """Causal attention of the image block, and of every question over the image and itself.

    In the last layer only the questions' rows. `split` rather than slices: its backward is one concatenation.
    """
    (qi, qt), (ki, kt), (vi, vt) = (t.split(sizes, 2) for t in (q, k, v))
    keys = ki.transpose(-1, -2)
    own_q, own_k, own_v = (t.unflatten(2, (count, -1)) for t in (qt, kt, vt))
    length = own_q.shape[3]
    own = (own_q @ own_k.transpose(-1, -2) + future[:length, :length]).flatten(2, 3)
    over = qt @ keys
    if barred is not None:
        over = over + barred[:, None]
    weights = torch.softmax(torch.cat([over, own], -1), -1)
    to_image, to_own = weights.split((sizes[0], length), -1)
    text = to_image @ vi + (to_own.unflatten(2, (count, -1)) @ own_v).flatten(2, 3)
    if last:
        return text
    # Rows in blocks, so that of a long image hardly more than the causal half is computed.
    ends = [*range(BLOCK, sizes[0] - BLOCK // 2, BLOCK), sizes[0]]
    parts = qi.split([b - a for a, b in zip([0, *ends], ends, strict=False)], 2)
    rows = [
        torch.softmax(part @ keys[..., :b] + future[b - part.shape[2] : b, :b], -1) @ vi[:, :, :b]
        for part, b in zip(parts, ends, strict=True)
    ]
    return torch.cat([*rows, text], 2)
