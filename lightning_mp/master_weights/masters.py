"""How the FP32 value of one parameter is kept, and how it stands in for the parameter in a step.

Each kind answers the same calls: ``load_all`` gives the FP32 tensors that an optimizer may update,
``store_all`` publishes what they became, ``value`` reads one, ``assign`` sets it. A weight that was
written from outside since it was last published is taken over when it is loaded or read. Loading and
storing work on many parameters at once, because each call of torch costs more than a small tensor.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_mp.master_weights.scratch import Scratch
from lightning_mp.master_weights.split import flat_view, join_, publish_, round_, split_

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

    @classmethod
    @torch.no_grad()
    def load_all(cls, masters: list[Self], scratch: Scratch) -> list[nn.Parameter]:
        for master in masters:
            master.move_()
        if not cls._are_published(masters, scratch):
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

    def value(self) -> Tensor:
        self.move_()
        self._take_over()
        return self._master.detach()

    @torch.no_grad()
    def assign(self, value: Tensor) -> None:
        self.move_()
        self._master.copy_(value)
        self._publish()

    def move_(self) -> None:
        master, param = self._master, self.param
        if master.device != param.device or master.stride() != param.stride():
            master.data = torch.empty_like(param, dtype=torch.float32).copy_(master)

    @torch.no_grad()
    def _publish(self) -> None:
        publish_(flat_view(self._master), flat_view(self.param))

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
    version counter, one through ``.data`` on a CPU by a sum over the bits. The first one replaces the
    master by the parameter as it stands. From then on the published bits are kept too (2 more bytes
    per element of this parameter), so that later writes replace only the elements that they changed.
    On other devices reading a sum would wait for the device, so a write through ``.data`` leaves no
    mark there: the master then rounds to the value written, within half a BF16 ulp of it.
    """

    def __init__(self, param: nn.Parameter, param_dtype: torch.dtype) -> None:
        self._lo = torch.empty_like(param, dtype=torch.int16)
        self._published: Tensor | None = None
        self._version = -1
        self._bit_sum = 0
        super().__init__(param, param_dtype)

    @property
    def nbytes(self) -> int:
        return self._lo.nbytes + (0 if self._published is None else self._published.nbytes)

    def tensors(self) -> list[Tensor]:
        return [self._lo]

    @classmethod
    @torch.no_grad()
    def load_all(cls, masters: list[Self], scratch: Scratch) -> list[nn.Parameter]:
        if not masters:
            return []
        his, los = cls._halves(masters)
        _, values = scratch.carve("weights", his[0].device, [hi.numel() for hi in his])
        join_(his, los, values)
        return [nn.Parameter(_shaped(value, master.param)) for value, master in zip(values, masters, strict=True)]

    @classmethod
    @torch.no_grad()
    def store_all(cls, masters: list[Self], stand_ins: list[nn.Parameter], scratch: Scratch) -> None:
        if not masters:
            return
        his, los = [flat_view(master.param) for master in masters], [flat_view(master._lo) for master in masters]
        block, values = scratch.carve("weights", his[0].device, [hi.numel() for hi in his])
        for value, stand_in, master in zip(values, stand_ins, masters, strict=True):
            if stand_in.data_ptr() != value.data_ptr():  # the optimizer assigned new memory to it
                _shaped(value, master.param).copy_(stand_in)
        split_(block, values, his, los)
        for master in masters:
            if master._published is not None:
                master._published.copy_(master.param)
        cls._settle_all(masters)

    @torch.no_grad()
    def value(self) -> Tensor:
        his, los = self._halves([self])
        value = torch.empty_like(self.param, dtype=torch.float32)
        join_(his, los, [flat_view(value)])
        return value

    @torch.no_grad()
    def assign(self, value: Tensor) -> None:
        self.move_()
        block = flat_view(torch.empty_like(self.param, dtype=torch.float32).copy_(value))
        split_(block, [block], [flat_view(self.param)], [flat_view(self._lo)])
        if self._published is not None:
            self._published.copy_(self.param)
        self.settle_writes()

    def settle_writes(self) -> None:
        self._settle_all([self])

    @staticmethod
    def _settle_all(masters: Sequence["SplitMaster"]) -> None:
        for master, bit_sum in zip(masters, _bit_sums([master.param for master in masters]), strict=True):
            master._version, master._bit_sum = master.param._version, bit_sum

    def move_(self) -> None:
        self._lo = _like(self._lo, self.param)
        if self._published is not None:
            self._published = _like(self._published, self.param)

    @staticmethod
    def _halves(masters: Sequence["SplitMaster"]) -> tuple[list[Tensor], list[Tensor]]:
        for master, bit_sum in zip(masters, _bit_sums([master.param for master in masters]), strict=True):
            master.move_()
            is_written = master._version != master.param._version or master._bit_sum != bit_sum
            if is_written or master._published is not None:
                master._take_over()
        return [flat_view(master.param) for master in masters], [flat_view(master._lo) for master in masters]

    @torch.no_grad()
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

    @classmethod
    def load_all(cls, masters: list[Self], scratch: Scratch) -> list[nn.Parameter]:
        return [nn.Parameter(master.param.detach()) for master in masters]

    @classmethod
    def store_all(cls, masters: list[Self], stand_ins: list[nn.Parameter], scratch: Scratch) -> None:
        """Do nothing: the stand-ins share the parameters' memory."""

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


def _bit_sums(params: list[nn.Parameter]) -> list[int]:
    """Sum the bits of each parameter on the CPU, four elements at a time; zeros on other devices."""
    if not params or params[0].device.type != "cpu":
        return [0] * len(params)
    sums: list[int] = torch.stack([_bit_sum(flat_view(param.detach())) for param in params]).tolist()
    return sums


def _bit_sum(flat: Tensor) -> Tensor:
    # Any single change shows; the sum may wrap. Four times fewer numbers make it 30 times faster.
    is_aligned = flat.numel() % 4 == 0 and flat.storage_offset() % 4 == 0
    return flat.view(torch.int64 if is_aligned else torch.int16).sum()


def _shaped(value: Tensor, param: nn.Parameter) -> Tensor:
    """View one-dimensional memory in the shape and strides of ``param``."""
    return value.view(param.shape) if param.is_contiguous() else value.as_strided(param.shape, param.stride())
