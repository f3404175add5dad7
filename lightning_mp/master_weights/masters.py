"""How the FP32 value of one parameter is kept, and how it stands in for the parameter in a step.

Each kind answers the same calls: ``load`` gives the FP32 tensor that an optimizer may update,
``store`` publishes what it became, ``value`` reads it, ``assign`` sets it. A weight that was written
from outside since it was last published is taken over by the first three.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lightning_mp.master_weights.split import flat_view, join_, publish_, split_

__all__ = ["CopyMaster", "Master", "NoMaster", "SplitMaster", "cast_param_"]


def cast_param_(param: nn.Parameter, dtype: torch.dtype) -> None:
    """Give ``param`` another dtype in place: the same ``Parameter`` object, without a gradient."""
    param.grad = None
    param.grad_dtype = None  # None allows any dtype while it changes
    param.data = param.data.to(dtype)
    param.grad_dtype = dtype


class Master(ABC):
    """The FP32 value of one model parameter.

    Args:
        param: A dense floating-point parameter. It is cast to ``param_dtype`` in place, after its
            value was taken; its identity is kept.
        param_dtype: ``torch.bfloat16`` or ``torch.float16``.
    """

    def __init__(self, param: nn.Parameter, param_dtype: torch.dtype) -> None:
        self.param = param
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

    @abstractmethod
    def load(self, out: Tensor | None = None) -> nn.Parameter:
        """Return what stands in for the parameter inside the step.

        Args:
            out: FP32 workspace of the parameter's shape and strides that may be used for it.
        """

    @abstractmethod
    def store(self, stand_in: nn.Parameter) -> None:
        """Take the updated value of what :meth:`load` returned and publish it to the parameter."""

    @abstractmethod
    def value(self) -> Tensor:
        """Return the FP32 value, on the parameter's device. It may be the master itself."""

    @abstractmethod
    def assign(self, value: Tensor) -> None:
        """Set the FP32 value from ``value`` (any floating dtype, the parameter's shape) and publish it."""

    def settle_writes(self) -> None:  # noqa: B027 - only some kinds have anything to note
        """Regard the parameter as published: what was written to it so far is the master's own."""

    def move_(self) -> None:  # noqa: B027 - only some kinds hold tensors
        """Follow the parameter to its device."""

    def restore_(self) -> None:
        """Give the parameter its FP32 value for good."""
        value = self.value().clone()
        cast_param_(self.param, torch.float32)
        self.param.data = value.to(self.param.device)


class CopyMaster(Master):
    """An FP32 tensor beside the parameter."""

    def __init__(self, param: nn.Parameter, param_dtype: torch.dtype) -> None:
        self._master = nn.Parameter(torch.empty_like(param, dtype=torch.float32))
        super().__init__(param, param_dtype)

    @property
    def nbytes(self) -> int:
        return self._master.nbytes

    def tensors(self) -> list[Tensor]:
        return [self._master.detach()]

    def load(self, out: Tensor | None = None) -> nn.Parameter:
        self._take_over()
        return self._master

    def store(self, stand_in: nn.Parameter) -> None:
        with torch.no_grad():
            publish_(flat_view(self._master), flat_view(self.param))

    def value(self) -> Tensor:
        self._take_over()
        return self._master.detach()

    def assign(self, value: Tensor) -> None:
        with torch.no_grad():
            self.move_()
            self._master.copy_(value)
            self.store(self._master)

    def move_(self) -> None:
        master, param = self._master, self.param
        if master.device != param.device or master.stride() != param.stride():
            master.data = torch.empty_like(param, dtype=torch.float32).copy_(master)

    @torch.no_grad()
    def _take_over(self) -> None:
        """Let elements of the parameter that are not the published ones replace the master's."""
        self.move_()
        master, param = flat_view(self._master), flat_view(self.param)
        published = torch.empty_like(param)
        publish_(master, published)
        # Compared as bits: a NaN equals itself, and -0.0 written over 0.0 is a write.
        found, expected = param.view(torch.int16), published.view(torch.int16)
        if param.device.type == "cpu" and torch.equal(found, expected):
            return
        torch.where(found == expected, master, param.to(torch.float32), out=master)


class SplitMaster(Master):
    """The 16 bits that the BF16 parameter lacks.

    A write through the parameter (``weight.zero_()`` under ``no_grad``, ``nn.init``) is seen by its
    version counter. The first one replaces the master by the parameter as it stands. From then on
    the published bits are kept too (2 more bytes per element of this parameter), so that later
    writes replace only the elements that they changed. A write through ``.data`` leaves no mark: the
    master then rounds to the value written, within half a BF16 ulp of it.
    """

    def __init__(self, param: nn.Parameter, param_dtype: torch.dtype) -> None:
        self._lo = torch.empty_like(param, dtype=torch.int16)
        self._published: Tensor | None = None
        self._version = -1
        super().__init__(param, param_dtype)

    @property
    def nbytes(self) -> int:
        return self._lo.nbytes + (0 if self._published is None else self._published.nbytes)

    def tensors(self) -> list[Tensor]:
        return [self._lo]

    def load(self, out: Tensor | None = None) -> nn.Parameter:
        return nn.Parameter(self._join(out))

    def store(self, stand_in: nn.Parameter) -> None:
        with torch.no_grad():
            split_(flat_view(stand_in), flat_view(self.param), flat_view(self._lo))
            if self._published is not None:
                self._published.copy_(self.param)
        self.settle_writes()

    def value(self) -> Tensor:
        return self._join(None)

    def assign(self, value: Tensor) -> None:
        with torch.no_grad():
            self.move_()
            self.store(nn.Parameter(torch.empty_like(self.param, dtype=torch.float32).copy_(value)))

    def settle_writes(self) -> None:
        self._version = self.param._version

    def move_(self) -> None:
        self._lo = _like(self._lo, self.param)
        if self._published is not None:
            self._published = _like(self._published, self.param)

    @torch.no_grad()
    def _join(self, out: Tensor | None) -> Tensor:
        self.move_()
        if self.param._version != self._version or self._published is not None:
            self._take_over()
        out = torch.empty_like(self.param, dtype=torch.float32) if out is None else out
        join_(flat_view(self.param), flat_view(self._lo), flat_view(out))
        return out

    def _take_over(self) -> None:
        if self._published is None:
            self._lo.zero_()
            self._published = self.param.detach().clone()
        else:
            changed = self._published.view(torch.int16) != self.param.detach().view(torch.int16)
            self._lo.masked_fill_(changed, 0)
            self._published.copy_(self.param)
        self.settle_writes()


class NoMaster(Master):
    """No FP32 value beyond the 16-bit parameter: the optimizer updates that."""

    @property
    def nbytes(self) -> int:
        return 0

    def load(self, out: Tensor | None = None) -> nn.Parameter:
        return nn.Parameter(self.param.detach())

    def store(self, stand_in: nn.Parameter) -> None:
        """Do nothing: the stand-in shares the parameter's memory."""

    def value(self) -> Tensor:
        return self.param.detach().to(torch.float32)

    def assign(self, value: Tensor) -> None:
        with torch.no_grad():
            self.param.copy_(value)

    def restore_(self) -> None:
        """Keep the 16-bit parameter: there is nothing to restore."""
        self.param.grad = None
        self.param.grad_dtype = self.param.dtype


def _like(tensor: Tensor, param: nn.Parameter) -> Tensor:
    """Return ``tensor`` on the device and in the layout of ``param``; itself where it is so already."""
    if tensor.device == param.device and tensor.stride() == param.stride():
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)
