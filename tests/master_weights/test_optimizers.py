"""Optimizers that cannot carry masters are refused before anything is changed."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_mp.errors import UnsupportedError
from lightning_mp.master_weights import MasterWeights


class FlatBuffer(torch.optim.SGD):
    """As optimizers that concatenate everything do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.flat = torch.cat([param.detach().flatten() for group in self.param_groups for param in group["params"]])


class HoldsParams(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.params = {"all": [param for group in self.param_groups for param in group["params"]]}


class Lookahead(Optimizer):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr)

    def step(self, closure: Any = None) -> None:
        self.base_optimizer.step()


class GlobalNorm(Optimizer):
    """As LAMB of apex: the update is divided by a norm over all gradients."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([param.grad.norm() for param in params]))
        for param in params:
            param.sub_(param.grad / norm, alpha=self.param_groups[0]["lr"])


class Estimating(Optimizer):
    """As Prodigy: a learning rate in the group, estimated from all parameters of the last step."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "d": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad, alpha=group["lr"] * group["d"])
                    group["d"] = max(group["d"], float(param.grad.abs().max()))


class SAM(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any) -> None:
        super().step()
        closure()
        super().step()


class Independent(Optimizer):
    """A custom optimizer that is fine: a counter in the group, one on itself, state made in the first step."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "count": 0})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        for group in self.param_groups:
            group["count"] += 1
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param].setdefault("sum", torch.zeros_like(param)).add_(param.grad)
                    param.sub_(self.state[param]["sum"] / group["count"] / self.calls, alpha=group["lr"])


class FusedAdam(torch.optim.Adam):
    """Transformer Engine's, as far as recognition goes."""

    def __init__(self, params: Any, lr: float, *, master_weights: bool = True) -> None:
        super().__init__(params, lr=lr)
        self.master_weights = master_weights


def from_package(package: str) -> type[Optimizer]:
    return type("FlashAdamW", (torch.optim.AdamW,), {"__module__": f"{package}.optim"})


class LateNorm(GlobalNorm):
    """Divides by the norm only after a warmup, counted where each kind of optimizer counts."""

    where = "attribute"

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.calls = 0
        for group in self.param_groups:
            group["calls"] = 0
            for param in group["params"]:
                self.state[param].update(calls=torch.tensor(0.0), sum=torch.zeros_like(param))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        late = False
        for group in self.param_groups:
            group["calls"] += 1
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param]["calls"].add_(1)
                    self.state[param]["sum"].add_(param.grad)
                    counts = {"attribute": self.calls, "group": group["calls"], "state": self.state[param]["calls"]}
                    late = late or bool(counts[self.where] > 1000)
        if late:
            super().step()


class LateNormByGroup(LateNorm):
    where = "group"


class LateNormByState(LateNorm):
    where = "state"


class KnowsIds(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.decayed = {id(param) for group in self.param_groups for param in group["params"] if param.dim() > 1}


class KnowsKeys(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.index = {param: i for i, param in enumerate(self.param_groups[0]["params"])}


class Box:
    pass


class Hides(Optimizer):
    """Knows one parameter in a place where nobody looks."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.box = Box()
        self.box.first = self.param_groups[0]["params"][0]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            if param.grad is not None:
                param.sub_(param.grad, alpha=2.0 if param is self.box.first else 1.0)


class CachesList(Optimizer):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.cached: list[Any] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.cached = self.cached or [param for group in self.param_groups for param in group["params"]]
        for param in self.cached:
            if param.grad is not None:
                param.sub_(param.grad, alpha=self.param_groups[0]["lr"])


class CachesFlat(Optimizer):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.flat: Any = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        grads = [param.grad.flatten() for group in self.param_groups for param in group["params"]]
        if grads:
            flat = torch.cat(grads)
            self.flat = flat if self.flat is None else self.flat * 0.9 + flat
            params = self.param_groups[0]["params"]
            for param, part in zip(params, self.flat.split([g.numel() for g in grads]), strict=True):
                param.sub_(part.view(param.shape), alpha=self.param_groups[0]["lr"])


CASES: dict[str, tuple[Any, str]] = {
    "lbfgs": (torch.optim.LBFGS, r"LBFGS mixes all parameters in one direction vector. Use an optimizer of torch"),
    "flat": (FlatBuffer, r"FlatBuffer.flat holds parameters or a flat buffer outside of param_groups"),
    "params": (HoldsParams, r"HoldsParams.params holds parameters or a flat buffer outside of param_groups"),
    "wrapper": (Lookahead, r"Lookahead.base_optimizer holds another optimizer \(SGD\)"),
    "norm": (GlobalNorm, r"GlobalNorm updates one parameter by what it sees of the others, as a norm over all"),
    "estimate": (Estimating, r"Estimating updates one parameter by what it sees of the others"),
    "late norm": (LateNorm, r"LateNorm updates one parameter by what it sees of the others"),
    "late norm by group": (LateNormByGroup, r"LateNormByGroup updates one parameter by what it sees of the others"),
    "late norm by state": (LateNormByState, r"LateNormByState updates one parameter by what it sees of the others"),
    "ids": (KnowsIds, r"KnowsIds.decayed knows parameters by their id\(\).*Put what differs into parameter groups"),
    "keys": (KnowsKeys, r"KnowsKeys.index holds parameters or a flat buffer outside of param_groups"),
    "hidden": (Hides, r"Hides knows its parameters by identity or keeps values of them from outside its step"),
    "cached list": (CachesList, r"CachesList keeps a list of parameters or a flat buffer from its first step \(in Ca"),
    "cached flat": (
        CachesFlat,
        r"CachesFlat keeps a list of parameters .* \(in CachesFlat.flat\), outside of par",
    ),
    "closure": (SAM, r"SAM.step demands a closure, which it may call between two updates"),
    "te": (FusedAdam, r"FusedAdam was built with master_weights=True and keeps masters of its own. Build it with"),
    "flashoptim": (from_package("flashoptim"), r"FlashOptim splits weights into masters itself \(FlashAdamW\). Use it"),
    "bitsandbytes": (from_package("bitsandbytes"), r"bitsandbytes keeps its state by parameter position"),
    "deepspeed": (from_package("deepspeed"), r"DeepSpeed optimizers hold their own masters"),
}


@pytest.mark.parametrize("mode", ["copy", "split"])
@pytest.mark.parametrize("case", CASES)
def test_an_optimizer_that_cannot_carry_masters_is_refused_with_the_fix(case: str, mode: str) -> None:
    cls, message = CASES[case]
    module = nn.Linear(4, 4)
    masters = MasterWeights(mode)
    masters.convert_(module)
    good = torch.optim.SGD(module.parameters(), lr=0.1)
    bad = cls(module.parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match=message):
        masters.attach([good, bad])
    assert "step" not in vars(good)
    assert "step" not in vars(bad)


def test_transformer_engine_adam_without_its_own_masters_is_accepted() -> None:
    module = nn.Linear(4, 4)
    masters = MasterWeights("split")
    masters.convert_(module)
    optimizer = FusedAdam(module.parameters(), lr=0.1, master_weights=False)
    masters.attach([optimizer])
    assert masters.step_path(optimizer).startswith("generic path")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch 2.13 imports it there
def test_zero_redundancy_optimizer_is_refused(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        module = nn.Linear(4, 4)
        masters = MasterWeights("copy")
        masters.convert_(module)
        optimizer = ZeroRedundancyOptimizer(module.parameters(), torch.optim.SGD, lr=0.1)
        with pytest.raises(UnsupportedError, match=r"ZeroRedundancyOptimizer\.\w+ holds"):
            masters.attach([optimizer])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["copy", "split"])
def test_a_custom_optimizer_that_treats_each_parameter_for_itself_is_accepted_untouched(mode: str) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(2, 2, 3))
    masters = MasterWeights(mode)
    masters.convert_(module)
    optimizer = Independent(module.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    random_state = torch.get_rng_state()
    masters.attach([optimizer])
    assert (optimizer.calls, optimizer.param_groups[0]["count"], len(optimizer.state)) == (0, 0, 0)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_an_optimizer_that_cannot_be_tried_is_not_judged() -> None:
    class Picky(Independent):
        def step(self, closure: Any = None) -> None:
            raise NotImplementedError

    module = nn.Linear(4, 4)
    masters = MasterWeights("split")
    masters.convert_(module)
    optimizer = Picky(module.parameters(), lr=0.1)
    masters.attach([optimizer])
    assert "step" in vars(optimizer)


def test_none_takes_any_optimizer() -> None:
    module = nn.Linear(4, 4)
    masters = MasterWeights("none")
    masters.convert_(module)
    optimizer = FlatBuffer(module.parameters(), lr=0.1)
    masters.attach([optimizer])
    assert "step" in vars(optimizer)


def test_adagrad_starts_from_the_unrounded_accumulator() -> None:
    # 0.1 in BF16 is 0.10009766.
    module = nn.Linear(4, 4)
    masters = MasterWeights("copy")
    masters.convert_(module)
    optimizer = torch.optim.Adagrad(module.parameters(), initial_accumulator_value=0.1)
    masters.attach([optimizer])
    state = optimizer.state[module.weight]["sum"]
    assert state.dtype is torch.float32
    assert torch.equal(state, torch.full((4, 4), 0.1))


@pytest.mark.filterwarnings("ignore")  # torchao and the compiler warn about their own internals
def test_torchao_8_bit_adam_steps_fp32_stand_ins_and_keeps_8_bit_states() -> None:
    optim = pytest.importorskip("torchao.optim")
    module = nn.Linear(128, 128, bias=False)
    reference = nn.Linear(128, 128, bias=False)
    with torch.no_grad():
        reference.weight.copy_(module.weight)
    start = module.weight.detach().clone()
    masters = MasterWeights("split")
    masters.convert_(module)
    optimizer = optim.AdamW8bit(module.parameters(), lr=1e-4)
    plain = optim.AdamW8bit(reference.parameters(), lr=1e-4)
    masters.attach([optimizer])
    # The author's step compiles one function; run it as written, a compiler is not what is tested.
    with torch.compiler.set_stance("force_eager"):
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            grad = torch.randn(128, 128, generator=generator)
            module.weight.grad, reference.weight.grad = grad, grad.clone()
            optimizer.step()
            plain.step()
    assert torch.equal(masters.value_of(module.weight), reference.weight)
    assert not torch.equal(reference.weight, start)
    assert type(optimizer.state[module.weight]["exp_avg"]).__name__ == "OptimState8bit"
