"""The models that the contenders train, in plain torch, and the FLOPs of one training step of each.

No vocabulary of a real tokenizer stands around the Llama-shaped blocks: with few layers on one card its two matrices
would be half of the model, and the blocks are what is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LLAMA_VOCAB = 1024
GPT_VOCAB = 50304  # GPT-2's 50257, rounded up to a multiple of 128 as everyone trains it


class Attention(nn.Module):
    """Multi-head attention through ``scaled_dot_product_attention``, with grouped keys and optional RoPE."""

    def __init__(self, width: int, heads: int, kv_heads: int, *, causal: bool, rope: bool, bias: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.causal, self.rope = causal, rope
        self.q = nn.Linear(width, width, bias=bias)
        self.k = nn.Linear(width, kv_heads * self.size, bias=bias)
        self.v = nn.Linear(width, kv_heads * self.size, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = (layer(x).view(rows, length, -1, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.rope:
            q, k = rotate(q), rotate(k)
        # Repeated by hand: in FP32 no fused kernel takes grouped keys, and the plain one keeps length^2 weights.
        groups = self.heads // self.kv_heads
        if groups > 1:
            k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(rows, length, width))

    def product_flops(self, x: Tensor) -> int:
        """FLOPs of the two products of one forward, the masked half counted, as is usual."""
        rows, length, width = x.shape
        return 2 * 2 * rows * length * length * width


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding over the last dimension, in the dtype of ``x``."""
    length, size = x.shape[-2:]
    steps = torch.arange(0, size, 2, device=x.device, dtype=torch.float32)
    angles = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * 500000.0 ** (-steps / size)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


class SwiGLU(nn.Module):
    """Llama's feed-forward network."""

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, ffn, bias=False), nn.Linear(width, ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MLP(nn.Module):
    """The feed-forward network of GPT and ViT."""

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a norm and beside a residual."""

    def __init__(self, attention: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.attention = norm(), attention
        self.norm2, self.mlp = norm(), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def llama_block(width: int, ffn: int, heads: int, kv_heads: int) -> Block:
    attention = Attention(width, heads, kv_heads, causal=True, rope=True, bias=False)
    return Block(attention, SwiGLU(width, ffn), lambda: nn.RMSNorm(width, eps=1e-5))


def gpt_block(width: int, heads: int, *, causal: bool) -> Block:
    attention = Attention(width, heads, heads, causal=causal, rope=False, bias=True)
    return Block(attention, MLP(width, 4 * width), lambda: nn.LayerNorm(width))


class Language(nn.Module):
    """A decoder: ``blocks`` between an embedding and a head; returns the loss of the next token."""

    def __init__(self, blocks: list[Block], width: int, vocab: int, length: int, *, positions: bool, tied: bool):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(length, width) if positions else None
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width) if positions else nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, vocab, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Vision(nn.Module):
    """A vision transformer with a class token."""

    def __init__(self, blocks: list[Block], width: int, image: int, patch: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.to(x.dtype).expand(len(x), -1, -1), x], dim=1) + self.positions.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)[:, 0]).float(), targets)


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.main = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.skip = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.skip(x))


class ConvNet(nn.Module):
    """ResNet-50's shape: stages of bottlenecks, each halving the image and doubling the width."""

    def __init__(self, stages: tuple[int, ...], width: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks, inputs = [], width
        for stage, count in enumerate(stages):
            for index in range(count):
                blocks.append(Bottleneck(inputs, width << stage, 2 if stage and not index else 1))
                inputs = 4 * (width << stage)
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(inputs, classes)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(images), 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x.mean((2, 3))).float(), targets)


@dataclass(frozen=True)
class ModelSpec:
    """One row of models.

    Args:
        name: As the tables call it.
        shape: ``llama``, ``gpt``, ``vit`` or ``conv``.
        width: Hidden size (width of the first stage of a ConvNet).
        layers: Blocks; 0 lets the memory decide.
        length: Tokens of a sequence, or pixels of an image's side.
        max_batch: The largest batch that is worth measuring.
    """

    name: str
    shape: str
    width: int
    layers: int
    length: int
    heads: int = 16
    kv_heads: int = 16
    ffn: int = 0
    vocab: int = GPT_VOCAB
    patch: int = 16
    stages: tuple[int, ...] = (3, 4, 6, 3)
    max_batch: int = 64

    @property
    def unit(self) -> str:
        """What throughput counts."""
        return "tokens" if self.shape in ("llama", "gpt") else "images"

    @property
    def units_per_sample(self) -> int:
        """How many of them a sample has."""
        return self.length if self.unit == "tokens" else 1

    def build(self) -> nn.Module:
        """Return the model; its ``forward(inputs, targets)`` returns the loss."""
        if self.shape == "llama":
            blocks = [llama_block(self.width, self.ffn, self.heads, self.kv_heads) for _ in range(self.layers)]
            return Language(blocks, self.width, self.vocab, self.length, positions=False, tied=False)
        if self.shape == "conv":
            return ConvNet(self.stages, self.width, self.vocab)
        blocks = [gpt_block(self.width, self.heads, causal=self.shape == "gpt") for _ in range(self.layers)]
        if self.shape == "vit":
            return Vision(blocks, self.width, self.length, self.patch, self.vocab)
        return Language(blocks, self.width, self.vocab, self.length, positions=True, tied=True)

    def batch(self, size: int, device: Any) -> tuple[Tensor, Tensor]:
        """Return random inputs and targets."""
        if self.unit == "images":
            images = torch.randn(size, 3, self.length, self.length, device=device)
            return images, torch.randint(self.vocab, (size,), device=device)
        tokens = torch.randint(self.vocab, (size, self.length + 1), device=device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


MODELS = (
    ModelSpec("llama-8b-blocks", "llama", 4096, 0, 4096, 32, 8, 14336, vocab=LLAMA_VOCAB, max_batch=2),
    ModelSpec("gpt-1.3b", "gpt", 2048, 24, 2048, max_batch=8),
    ModelSpec("gpt2-124m", "gpt", 768, 12, 1024, 12, 12, max_batch=32),
    ModelSpec("vit-l16", "vit", 1024, 24, 224, vocab=1000, max_batch=128),
    ModelSpec("convnet-50", "conv", 64, 16, 224, vocab=1000, max_batch=256),
)
MAX_LLAMA_LAYERS = 16


def shrunk(spec: ModelSpec) -> ModelSpec:
    """Return the model of a rehearsal: the same code, a few thousand parameters."""
    small = {"llama": 32, "gpt": 32, "vit": 32, "conv": 16}[spec.shape]
    length = 16 if spec.unit == "tokens" else 32
    return replace(
        spec, width=small, layers=2, length=length, heads=2, kv_heads=1 if spec.shape == "llama" else 2,
        ffn=64, vocab=64, patch=8, stages=(1, 1), max_batch=4,
    )  # fmt: skip


def llama_layers_that_fit(spec: ModelSpec, memory: int) -> int:
    """Return how many blocks train in FP32 with AdamW beside one sequence, leaving 15% of the memory.

    Per block: 16 bytes per parameter (weight, gradient, two states), and the activations of FP32: about
    14 tensors of the width and 5 of the FFN's per token.
    """
    head = spec.width // spec.heads
    params = spec.width * (2 * spec.width + 2 * spec.kv_heads * head) + 3 * spec.width * spec.ffn
    per_block = 16 * params + 4 * spec.length * (14 * spec.width + 5 * spec.ffn)
    return max(1, min(MAX_LLAMA_LAYERS, int(0.85 * memory / per_block)))


def training_flops(spec: ModelSpec, size: int) -> int:
    """Return the FLOPs of the matrix products of one step: forward, gradients of inputs and of weights.

    Counted on ``meta`` tensors by shape: each Linear and convolution, and the two products of attention. What no
    gradient needs, such as that of the images, is not counted; neither is recomputation.
    """
    with torch.device("meta"):
        model = spec.build()
    total = 0

    def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total
        times = 3 if args[0].requires_grad else 2
        if isinstance(module, nn.Linear):
            total += times * 2 * output.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            total += times * 2 * output.numel() * module.weight[0].numel()
        elif isinstance(module, Attention):
            total += times * module.product_flops(args[0])

    handles = [module.register_forward_hook(count) for module in model.modules()]
    model(*spec.batch(size, "meta"))
    for handle in handles:
        handle.remove()
    return total
