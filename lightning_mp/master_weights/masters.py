"""How the FP32 value of one parameter is kept, and how it stands in for the parameter in a step.

Each kind answers the same calls: ``load_all`` gives the FP32 tensors that an optimizer may update,
``store_all`` publishes what they became, ``value`` reads one, ``assign`` sets it. A weight that was
written from outside since it was last published is taken over when it is loaded or read. Loading and
storing work on many parameters at once, because each call of torch costs more than a small tensor.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_mp.errors import UnsupportedError
from lightning_mp.master_weights.scratch import Scratch
from lightning_mp.master_weights.split import flat_view, publish_, round_

__all__ = ["CopyMaster", "Master", "NoMaster", "cast_param_", "new_stand_in", "outside_inference_mode"]

_F = TypeVar("_F", bound=Callable[..., Any])


def cast_param_(param: nn.Parameter, dtype: torch.dtype) -> None:
    """Give ``param`` another dtype in place: the same ``Parameter`` object, without a gradient."""
    param.grad = None
    param.grad_dtype = None  # None allows any dtype while it changes
    param.data = param.data.to(dtype)
    param.grad_dtype = dtype


def new_stand_in(param: nn.Parameter, value: Tensor) -> nn.Parameter:
    """Return a parameter over the memory of ``value`` that has the attributes of ``param``, now and later.

    A master keeps its stand-in: an optimizer may know it by identity from the first step on.
    """
    stand_in = nn.Parameter(value)
    stand_in.__dict__ = param.__dict__
    return stand_in


def outside_inference_mode(method: _F) -> _F:
    """Run a method out of inference mode: what it keeps is for training to use.

    A callback that samples in inference mode may save a checkpoint there.
    """

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return call  # type: ignore[return-value]


class Master(ABC):
    """The FP32 value of one model parameter.

    Args:
        param: A dense floating-point parameter. It is cast to ``param_dtype`` in place, after its
            value was taken; its identity is kept.
        param_dtype: ``torch.bfloat16`` or ``torch.float16``.
    """

    def __init__(self, param: nn.Parameter, param_dtype: torch.dtype) -> None:
        self.param = param
        self.is_under_ddp = False
        self._param_dtype = param_dtype
        value = param.detach().to(torch.float32)
        cast_param_(param, param_dtype)
        self.assign(value)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes kept between steps besides the model parameter."""

    def tensors(self) -> list[Tensor]:
        """Return what is kept besides the model parameter, to be sent to other ranks in place."""
        return []

    @classmethod
    @abstractmethod
    def load_all(cls, masters: list[Self], scratch: Scratch) -> list[nn.Parameter]:
        """Return what stands in for the parameters inside the step.

        Args:
            masters: Masters of this kind on one device.
            scratch: Memory that the stand-ins may use until they are stored.
        """

    @classmethod
    @abstractmethod
    def store_all(cls, masters: list[Self], stand_ins: list[nn.Parameter], scratch: Scratch) -> None:
        """Take the updated values of what :meth:`load_all` returned and publish them to the parameters."""

    @classmethod  # noqa: B027 - only some kinds have anything to do
    def before_in_place(cls, masters: list[Self]) -> None:
        """Prepare for an update that works on the parameters and on :meth:`tensors` as they are."""

    @classmethod  # noqa: B027 - only some kinds have anything to do
    def after_in_place(cls, masters: list[Self]) -> None:
        """Regard what such an update wrote to the parameters as published."""

    @abstractmethod
    def value(self) -> Tensor:
        """Return the FP32 value, on the parameter's device. It may be the master itself."""

    @abstractmethod
    def assign(self, value: Tensor) -> None:
        """Set the FP32 value from ``value`` (any floating dtype, the parameter's shape) and publish it."""

    def take_writes_(self) -> None:  # noqa: B027 - only some kinds need it
        """Take over what was written before training, and regard the parameter as published."""

    def settle_writes(self) -> None:  # noqa: B027 - only some kinds have anything to note
        """Regard the parameter as published: what was written to it so far is the master's own."""

    @outside_inference_mode
    def move_(self) -> None:
        """Follow the parameter: to its device, and back from another dtype that ``param.data = ...`` gave it."""
        if self.param.dtype is not self._param_dtype:
            self._take_whole_()

    def _take_whole_(self) -> None:
        """Make the value that was assigned through ``.data`` the master's, as it is, and cast the parameter again.

        Where it is the published value, as after ``module.float()``, the master keeps its own.
        """
        param = self.param
        if self.is_under_ddp:
            raise UnsupportedError(
                f"master_weights: a weight of shape {tuple(param.shape)} was assigned memory of {param.dtype} through "
                f".data, which disconnects a {self._param_dtype} parameter from DDP, in silence. Write values with "
                "`with torch.no_grad(): weight.copy_(value)`."
            )
        value = self._with_own_bits(param.detach().to(torch.float32, copy=True))
        grad, grad_dtype = param.grad, param.grad_dtype
        cast_param_(param, self._param_dtype)
        param.grad_dtype = grad_dtype
        param.grad = grad if grad is None or grad_dtype is None else grad.to(grad_dtype)
        self.assign(value)

    def _with_own_bits(self, value: Tensor) -> Tensor:
        """Return FP32 ``value`` with the master's value where it is only what was published of that."""
        return value

    @outside_inference_mode
    def restore_(self) -> None:
        """Give the parameter its FP32 value for good."""
        is_own = self.param.dtype is not self._param_dtype
        value = self.param.detach().to(torch.float32) if is_own else self.value()
        value = value.clone()
        cast_param_(self.param, torch.float32)
        self.param.data = value.to(self.param.device)


class CopyMaster(Master):
    """An FP32 tensor beside the parameter.

    ``state_dict`` shows this tensor itself, so a write into what it returned reaches the parameter when
    it is loaded or read next.
    """

    def __init__(self, param: nn.Parameter, param_dtype: torch.dtype) -> None:
        self._version = -1
        self._master = new_stand_in(param, torch.empty_like(param, dtype=torch.float32))
        super().__init__(param, param_dtype)

    @property
    def nbytes(self) -> int:
        return self._master.nbytes

    def tensors(self) -> list[Tensor]:
        return [self._master.detach()]

    @classmethod
    @torch.no_grad()
    def load_all(cls, masters: list[Self], scratch: Scratch) -> list[nn.Parameter]:
        for master in masters:
            master.move_()
        is_written = any(master._version != master._master._version for master in masters)
        if is_written or not cls._are_published(masters, scratch):
            for master in masters:
                master._take_over()
        return [master._master for master in masters]

    @classmethod
    @torch.no_grad()
    def store_all(cls, masters: list[Self], stand_ins: list[nn.Parameter], scratch: Scratch) -> None:
        if not masters or masters[0].param.dtype is not torch.bfloat16:
            for master in masters:
                master._publish()
            return
        bits = cls._rounded(masters, scratch)
        torch._foreach_copy_([flat_view(master.param).view(torch.int16) for master in masters], bits)
        for master in masters:
            master._version = master._master._version

    @classmethod
    def before_in_place(cls, masters: list[Self]) -> None:
        for master in masters:
            if master._version != master._master._version:  # else the published value would look like a write
                master._publish()

    @classmethod
    def after_in_place(cls, masters: list[Self]) -> None:
        for master in masters:
            master._version = master._master._version

    @outside_inference_mode
    def value(self) -> Tensor:
        self.move_()
        self._take_over()
        return self._master.detach()

    @outside_inference_mode
    @torch.no_grad()
    def assign(self, value: Tensor) -> None:
        self.move_()
        self._master.copy_(value)
        self._publish()

    @outside_inference_mode
    def move_(self) -> None:
        master, param = self._master, self.param
        if param.dtype is not self._param_dtype:
            self._take_whole_()
        if master.device != param.device or master.stride() != param.stride():
            master.data = torch.empty_like(param, dtype=torch.float32).copy_(master)

    @torch.no_grad()
    def _with_own_bits(self, value: Tensor) -> Tensor:
        master = self._master.detach()
        published = torch.empty_like(master, dtype=self._param_dtype)
        publish_(flat_view(master), flat_view(published))
        return torch.where(value == published.to(value.device), master.to(value.device), value)

    @torch.no_grad()
    def _publish(self) -> None:
        publish_(flat_view(self._master), flat_view(self.param))
        self._version = self._master._version

    @staticmethod
    def _rounded(masters: Sequence["CopyMaster"], scratch: Scratch) -> list[Tensor]:
        """Return the bits of the working weights, sign-extended to int32."""
        sizes = [master.param.numel() for master in masters]
        block, views = scratch.carve("weights", masters[0].param.device, sizes)
        torch._foreach_copy_(views, [flat_view(master._master) for master in masters])
        round_(block)
        return [view.view(torch.int32) for view in views]

    @classmethod
    def _are_published(cls, masters: list[Self], scratch: Scratch) -> bool:
        """Tell at one glance that no parameter was written, where that needs no wait for a device."""
        if not masters:
            return True
        param = masters[0].param
        if param.device.type != "cpu" or param.dtype is not torch.bfloat16:
            return False
        expected = cls._rounded(masters, scratch)
        _, views = scratch.carve("compared", param.device, [bits.numel() for bits in expected])
        found = [view.view(torch.int32) for view in views]
        torch._foreach_copy_(found, [flat_view(master.param).view(torch.int16) for master in masters])
        return all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))

    @torch.no_grad()
    def _take_over(self) -> None:
        """Let elements of the parameter that are not the published ones replace the master's."""
        if self._version != self._master._version:
            self._publish()
            return
        master, param = flat_view(self._master), flat_view(self.param)
        published = torch.empty_like(param)
        publish_(master, published)
        # Compared as bits: a NaN equals itself, and -0.0 written over 0.0 is a write.
        found, expected = param.view(torch.int16), published.view(torch.int16)
        if param.device.type == "cpu" and torch.equal(found, expected):
            return
        torch.where(found == expected, master, param.to(torch.float32), out=master)
        self._version = self._master._version


class NoMaster(Master):
    """No FP32 value beyond the 16-bit parameter: the optimizer updates that."""

    def __init__(self, param: nn.Parameter, param_dtype: torch.dtype) -> None:
        super().__init__(param, param_dtype)
        self._stand_in = new_stand_in(param, param.detach())

    @property
    def nbytes(self) -> int:
        return 0

    @classmethod
    def load_all(cls, masters: list[Self], scratch: Scratch) -> list[nn.Parameter]:
        for master in masters:
            master.move_()
            master._stand_in.data = master.param.detach()
        return [master._stand_in for master in masters]

    @classmethod
    def store_all(cls, masters: list[Self], stand_ins: list[nn.Parameter], scratch: Scratch) -> None:
        """Do nothing: the stand-ins share the parameters' memory."""

    def value(self) -> Tensor:
        return self.param.detach().to(torch.float32)

    @outside_inference_mode
    @torch.no_grad()
    def assign(self, value: Tensor) -> None:
        self.param.copy_(value)

    def restore_(self) -> None:
        """Keep the 16-bit parameter: there is nothing to restore."""
        self.param.grad = None
        self.param.grad_dtype = self.param.dtype
