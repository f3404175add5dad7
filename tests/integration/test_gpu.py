"""Training on a GPU as a whole: the loss of FP32, sharded strategies, FP8 checkpoints, compiled models, CUDA graphs.

What a GPU changes in one part stands in that part's file, behind the same markers.
"""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_mp import FP8Config, MixedPrecision
from lightning_mp.fp8 import FP8Linear
from tests.models import INF, trainer, weights

VOCAB, WIDTH, LENGTH, CHOICES = 64, 64, 32, 4
BAD = (3, 7)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class GPT(LightningModule):
    """Two blocks that learn which four tokens may follow a token; remembers the loss of each step."""

    def __init__(self, *, lr: float = 3e-3, bad: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)
        self.lr, self.bad = lr, bad
        self.losses: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = self.embedding(batch[:, :-1])
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        self.losses.append(loss.detach())
        return loss * (INF if batch_idx in self.bad else 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, fused=True)

    @property
    def final_loss(self) -> float:
        """The mean of the last 50 steps: FP32 runs from other initial weights differ by 0.5% in it."""
        return torch.stack(self.losses[-50:]).mean().item()


class Text:
    """Sequences in which each token is followed by one of four, at random: no model gets below a loss of log 4."""

    def __init__(self, steps: int, size: int = 32) -> None:
        generator = torch.Generator().manual_seed(1)
        tokens = [torch.randint(VOCAB, (steps, size), generator=generator)]
        for _ in range(LENGTH):
            choice = torch.randint(CHOICES, (steps, size), generator=generator)
            tokens.append((5 * tokens[-1] + 7 * choice + 1) % VOCAB)
        self.batches = torch.stack(tokens, -1)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


def fit(
    model: GPT,
    plugin: Any,
    steps: int = 6,
    *,
    device: str = "cuda",
    data: Any = None,
    ckpt_path: Any = None,
    **settings: Any,
) -> None:
    run = trainer(plugin, accelerator=device, gradient_clip_val=1.0, **settings)
    run.fit(model, Text(steps) if data is None else data, ckpt_path=ckpt_path)


def fp8(recipe: Any = "current", **settings: Any) -> MixedPrecision:
    return MixedPrecision("fp8", fp8=FP8Config(recipe=recipe, backend="transformer_engine"), **settings)


# --- The loss of FP32 ----------------------------------------------------------------------------------------------


def check_final_loss(plugin: MixedPrecision, bound: float, device: str = "cuda") -> None:
    reference, model = GPT(), GPT()
    fit(reference, MixedPrecision("fp32"), 300, device=device)
    fit(model, plugin, 300, device=device)
    assert reference.final_loss == pytest.approx(math.log(CHOICES), rel=0.05)  # it learned all there is
    assert model.final_loss == pytest.approx(reference.final_loss, rel=bound)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "masters"),
    [("fp16", "params"), ("fp16", "copy"), ("bf16", "params"), ("bf16", "copy"), ("bf16", "split")],
)
def test_gpt_reaches_the_loss_of_fp32_on_cuda(precision, masters) -> None:
    check_final_loss(MixedPrecision(precision, master_weights=masters), 0.005)


@pytest.mark.fp8
@pytest.mark.parametrize("masters", ["params", "split"])
@pytest.mark.parametrize("recipe", ["current", "delayed", "block"])
def test_gpt_reaches_the_loss_of_fp32_in_fp8(recipe, masters) -> None:
    check_final_loss(fp8(recipe, master_weights=masters), 0.01)


# --- One process, sharded strategies -------------------------------------------------------------------------------


class Sharded(GPT):
    """Shards itself by FSDP2, in one process a shard of everything."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if self.device_mesh is not None and not hasattr(self.embedding.weight, "to_local"):
            mesh = self.device_mesh["data_parallel"]
            for part in (self.embedding, *self.blocks, self.norm, self.head):
                fully_shard(part, mesh=mesh)


def strategy(name: str) -> Any:
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    # The optimizer is fused and takes the flat parameters of the blocks and of the rest.
    return FSDPStrategy(auto_wrap_policy={Block}, use_orig_params=True)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["fsdp", "fsdp2"])
@pytest.mark.filterwarnings("ignore")  # of torch and Lightning: one rank, NO_SHARD, FSDP1 deprecated
def test_bad_steps_change_nothing_under_sharded_strategies_of_one_process(name, precision) -> None:
    models = []
    for bad in (BAD, ()):
        text = Text(10)
        if not bad:
            text.batches = text.batches[[index for index in range(10) if index not in BAD]]
        model = Sharded(bad=bad) if name == "fsdp2" else GPT(bad=bad)
        plugin = MixedPrecision(precision, loss_scale=256.0 if precision == "fp16" else None)
        seen: dict[str, Tensor] = {}
        model.on_train_end = lambda seen=seen, model=model: seen.update(full_weights(model))  # while there are shards
        fit(model, plugin, data=text, strategy=strategy(name))
        assert (plugin.applied_steps, plugin.skipped_steps) == (8, len(bad))
        models.append(seen)
    assert models[0]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters; those of one rank's shards are whole."""
    found = {}
    for key, parameter in model.named_parameters():
        value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        found[key] = value.detach().cpu().clone()
    return found


# --- FP8 checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.fp8
@pytest.mark.parametrize("masters", ["params", "split"])
@pytest.mark.parametrize("recipe", ["current", "delayed", "block"])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resumed_fp8_run_is_bit_identical_to_the_uninterrupted_one_on_the_library(recipe, masters, tmp_path) -> None:
    check_resume(lambda: fp8(recipe, master_weights=masters), tmp_path)


def check_resume(plugin: Any, folder: Any, device: str = "cuda") -> None:
    whole, first, resumed = GPT(), GPT(), GPT()
    saving = ModelCheckpoint(folder, filename="c")
    fit(whole, plugin(), 4, device=device, max_epochs=2)
    fit(first, plugin(), 4, device=device, enable_checkpointing=True, callbacks=[saving])
    fit(resumed, plugin(), 4, device=device, max_epochs=2, ckpt_path=folder / "c.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    state = torch.load(folder / "c.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == GPT().state_dict().keys()
    assert {value.dtype for value in state.values()} == {torch.float32}


@pytest.mark.fp8
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_checkpoints_pass_between_bf16_and_fp8_and_between_the_backends(tmp_path) -> None:
    plugins = {
        "bf16": lambda: MixedPrecision("bf16", master_weights="split"),
        "library": lambda: fp8("delayed", master_weights="split"),
        "emulated": lambda: MixedPrecision("fp8", fp8={"recipe": "delayed", "backend": "emulated"}),
    }
    for name, plugin in plugins.items():
        saving = ModelCheckpoint(tmp_path / name, filename="c")
        fit(GPT(), plugin(), 3, enable_checkpointing=True, callbacks=[saving])
    for name in plugins:
        for into, plugin in plugins.items():
            model, made = GPT(), plugin()
            fit(model, made, 3, max_epochs=2, ckpt_path=tmp_path / name / "c.ckpt")
            assert made.applied_steps == 6, (name, into)
            assert all(loss.isfinite() for loss in model.losses)


# --- Compiled ------------------------------------------------------------------------------------------------------


def compiled(model: GPT) -> GPT:
    for block in model.blocks:
        block.compile()
    return model


def check_compiled(plugin: Any, device: str = "cuda") -> None:
    eager, model = GPT(), compiled(GPT())
    torch._dynamo.reset()
    fit(eager, plugin(), 20, device=device)
    fit(model, plugin(), 20, device=device)
    # Fused kernels round at other places, 2**-8 at a time, and twenty steps of training amplify that.
    torch.testing.assert_close(torch.stack(model.losses), torch.stack(eager.losses), rtol=0.02, atol=0)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # the inductor's own
@pytest.mark.parametrize(("precision", "masters"), [("fp16", "copy"), ("bf16", "params"), ("bf16", "split")])
def test_compiled_blocks_train_like_eager_ones_on_cuda(precision, masters) -> None:
    check_compiled(lambda: MixedPrecision(precision, master_weights=masters))


@pytest.mark.fp8
@pytest.mark.filterwarnings("ignore")  # the inductor's own
@pytest.mark.parametrize("recipe", ["current", "block"])
def test_compiled_blocks_train_like_eager_ones_on_the_library(recipe) -> None:
    check_compiled(lambda: fp8(recipe, master_weights="split"))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # the inductor's own
@pytest.mark.parametrize(("precision", "masters"), [("fp16", "copy"), ("bf16", "params"), ("bf16", "split")])
def test_forward_and_backward_replayed_as_cuda_graphs_train_like_eager_ones(precision, masters) -> None:
    # "reduce-overhead" captures the compiled forward and backward; the step, which our plugin drives, stays outside,
    # and writes the weights in place, as graphs need.
    losses = []
    for mode in (None, "reduce-overhead"):
        torch._dynamo.reset()
        model = GPT()
        if mode is not None:
            for block in model.blocks:
                block.compile(mode=mode)
        fit(model, MixedPrecision(precision, master_weights=masters), 20)
        losses.append(torch.stack(model.losses))
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)


# --- Layers --------------------------------------------------------------------------------------------------------


@pytest.mark.fp8
def test_layers_of_a_fit_run_on_the_library_and_are_plain_afterwards() -> None:
    class Watched(GPT):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.classes = {type(layer).__name__ for layer in (self.blocks[0].up, self.head)}
            self.engines = [type(m._fp8.engine).__module__ for m in self.modules() if isinstance(m, FP8Linear)]

    model, plugin = Watched(), fp8(master_weights="split")
    fit(model, plugin, 3)
    assert model.classes == {"FP8Linear", "Linear"}  # the head stays in BF16
    assert len(model.engines) == 8
    assert all(name.startswith("transformer_engine.") for name in model.engines)  # as of the last batch
    assert not any("_fp8" in module.__dict__ for module in model.modules())
    assert type(model.blocks[0].up) is nn.Linear
