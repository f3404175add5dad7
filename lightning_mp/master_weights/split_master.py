"""The master that adds to a BF16 parameter the 16 bits that it lacks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_mp.master_weights.fingerprint import changed_elements, fingerprints
from lightning_mp.master_weights.masters import Master, new_stand_in, outside_inference_mode
from lightning_mp.master_weights.scratch import Scratch
from lightning_mp.master_weights.split import flat_view, join_, split_

__all__ = ["SplitMaster"]

_NO_FINGERPRINT = torch.empty(0, dtype=torch.int64, device="cpu")
_NOTHING = torch.empty(0, dtype=torch.float32, device="cpu")


class SplitMaster(Master):
    """The 16 bits that the BF16 parameter lacks.

    On a CPU a write from outside is seen by a fingerprint of the bits. The first one replaces the master
    by the parameter as it stands in the blocks of 256 elements that it changed. From then on the published
    bits are kept too (2 more bytes per element of this parameter), so that later writes replace only the
    elements that they changed; ``keep_published_`` starts with that. A weight that was written and put back
    counts as not written.

    On other devices reading a fingerprint would wait for the device. There a write through the parameter
    (``weight.zero_()`` under ``no_grad``) is seen by its version counter, and the first one replaces the
    whole master. A write through ``.data``, as of ``vector_to_parameters``, leaves no mark there: the further
    bits of before join the value written, which stays within half a BF16 ulp.
    """

    def __init__(self, param: nn.Parameter, param_dtype: torch.dtype) -> None:
        self._lo = torch.empty_like(param, dtype=torch.int16)
        self._published: Tensor | None = None
        self._version = -1
        self._fingerprint = _NO_FINGERPRINT
        super().__init__(param, param_dtype)
        self._stand_in = new_stand_in(param, _NOTHING)

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
        for value, master in zip(values, masters, strict=True):
            master._stand_in.data = _shaped(value, master.param)
        return [master._stand_in for master in masters]

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
            master._stand_in.data = _NOTHING  # the bucket's memory is for the next one
            if master._published is not None:
                master._published.copy_(master.param)
        cls._settle_all(masters)

    @classmethod
    def before_in_place(cls, masters: list[Self]) -> None:
        cls._halves(masters)

    @classmethod
    @torch.no_grad()
    def after_in_place(cls, masters: list[Self]) -> None:
        for master in masters:
            if master._published is not None:
                master._published.copy_(master.param)
        cls._settle_all(masters)

    @outside_inference_mode
    @torch.no_grad()
    def value(self) -> Tensor:
        his, los = self._halves([self])
        value = torch.empty_like(self.param, dtype=torch.float32)
        join_(his, los, [flat_view(value)])
        return value

    @outside_inference_mode
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

    @outside_inference_mode
    def take_writes_(self) -> None:
        # Compared by content on any device, once: strategies and DDP touch parameters without changing them.
        found = fingerprints([flat_view(self.param)])[0].cpu()
        if self._fingerprint.numel() > 0 and not torch.equal(found, self._fingerprint):
            self._take_over()
        self.settle_writes()

    def keep_published_(self) -> None:
        """Keep the published bits from now on, for a parameter that others will write."""
        if self._published is None:
            self._published = self.param.detach().clone()

    @staticmethod
    def _settle_all(masters: Sequence["SplitMaster"]) -> None:
        found = _fingerprints_on_cpu(masters)
        for master, numbers in zip(masters, found, strict=True):
            master._version, master._fingerprint = master.param._version, numbers

    @staticmethod
    def _written(masters: Sequence["SplitMaster"]) -> list["SplitMaster"]:
        """Return those whose parameter may have been written since it was published."""
        if masters[0].param.device.type != "cpu":
            # With the published bits at hand no question to the device is needed: they are compared there.
            return [m for m in masters if m._version != m.param._version or m._published is not None]
        found, expected = _fingerprints_on_cpu(masters), [master._fingerprint for master in masters]
        if torch.equal(torch.cat(found), torch.cat(expected)):
            return []
        return [m for m, now, then in zip(masters, found, expected, strict=True) if not torch.equal(now, then)]

    @outside_inference_mode
    def move_(self) -> None:
        if self.param.dtype is not self._param_dtype:
            self._take_whole_()
        if self._lo.stride() != self.param.stride():
            # Fingerprints follow the memory: in another order, as of channels_last, each block would look written.
            in_old_order = torch.empty_like(self._lo, dtype=self.param.dtype).copy_(self.param.detach())
            if self._is_written(in_old_order):
                self._take_over(in_old_order)
            self._lo = _like(self._lo, self.param)
            self.settle_writes()
        self._lo = _like(self._lo, self.param)
        if self._published is not None:
            self._published = _like(self._published, self.param)

    @torch.no_grad()
    def _with_own_bits(self, value: Tensor) -> Tensor:
        cast = torch.empty_like(self._lo, dtype=self._param_dtype).copy_(value)
        joined = torch.empty_like(cast, dtype=torch.float32)
        join_([flat_view(cast)], [flat_view(self._lo)], [flat_view(joined)])
        is_own = ~self._changed(cast).to(value.device) & (value == cast.to(value.device))
        return torch.where(is_own, joined.to(value.device), value)

    def _changed(self, bits: Tensor) -> Tensor:
        """Mark the elements of ``bits``, in the order of what is kept, that may not be those that were published."""
        if self._published is not None:
            return self._published.view(torch.int16) != bits.view(torch.int16)
        marked = torch.ones_like(bits, dtype=torch.bool)
        if self._fingerprint.numel() > 0:
            flat = flat_view(bits)
            found = fingerprints([flat])[0].cpu()
            flat_view(marked).copy_(changed_elements(self._fingerprint, found, flat))
        return marked

    @staticmethod
    def _halves(masters: Sequence["SplitMaster"]) -> tuple[list[Tensor], list[Tensor]]:
        for master in masters:
            master.move_()
        for master in SplitMaster._written(masters):
            master._take_over()
        return [flat_view(master.param) for master in masters], [flat_view(master._lo) for master in masters]

    def _is_written(self, bits: Tensor) -> bool:
        if bits.device.type != "cpu" or self._fingerprint.numel() == 0:
            return self._version != self.param._version or self._published is not None
        return not torch.equal(fingerprints([flat_view(bits)])[0], self._fingerprint)

    @torch.no_grad()
    def _take_over(self, bits: Tensor | None = None) -> None:
        """Let what was written replace the master: found in ``bits``, the parameter's in the order of what is kept."""
        bits = self.param.detach() if bits is None else bits
        self._lo.masked_fill_(self._changed(bits), 0)
        self._published = bits.clone()
        self.settle_writes()


def _like(tensor: Tensor, param: nn.Parameter) -> Tensor:
    """Return ``tensor`` on the device and in the layout of ``param``; itself where it is so already."""
    if tensor.device == param.device and tensor.stride() == param.stride():
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)


def _fingerprints_on_cpu(masters: Sequence[SplitMaster]) -> list[Tensor]:
    if masters[0].param.device.type != "cpu":
        return [_NO_FINGERPRINT] * len(masters)
    return fingerprints([flat_view(master.param) for master in masters])


def _shaped(value: Tensor, param: Tensor) -> Tensor:
    """View one-dimensional memory in the shape and strides of ``param``."""
    return value.view(param.shape) if param.is_contiguous() else value.as_strided(param.shape, param.stride())
