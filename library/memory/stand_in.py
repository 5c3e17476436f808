"""A stand-in accelerator for machines without a GPU: full-size models step on it in seconds, without weights.

``install`` registers a device ("standin", PrivateUse1) from Python. Under ``without_weights`` every tensor has a
device, a shape and a dtype, but no numbers. A step then fails for three kinds of fault that a run on the CPU does not
show:

- Tensors of different devices meet.
- The step waits for the device (``.item()``, ``bool(tensor)``): DataDependentOutputException.
- It takes more memory than before: ``Trace`` counts the bytes of live storages, and the kernels.

The device needs a process of its own, because it changes torch for good. How models get onto it, in short: build
modules under ``torch.device(install())`` with the default dtype set; ``.to(dtype)`` of a whole module does not work,
and no other random number than those of CPU generators can be drawn.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "standin"
#: operators that autocast computes in half precision, as on a GPU
_IN_HALF = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv2d", "_convolution")
#: operators that launch nothing: they give memory, or another shape to what is there
_NO_KERNEL = frozenset(
    f"aten::{name}" for name in ("empty.memory_format", "empty_like", "empty_strided", "new_empty", "_unsafe_view")
)
#: registrations end with these objects
_libraries: list[torch.library.Library] = []


class _Backend(backend_registration._DummyBackendModule):
    """The module of the device, with the answers that torch asks for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def install() -> torch.device:
    """Register the device, once a process; returns it."""
    if not _libraries:
        backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
        others = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
        others.fallback(torch.library.fallthrough_kernel)
        aten = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
        for name in _IN_HALF:
            aten.impl(name, _in_half(getattr(torch.ops.aten, name)))
        _libraries.extend([others, aten])
        _fuse_attention()
        _fuse_norm()
    return torch.device(NAME, 0)


def _in_half(operator: Any) -> Callable[..., Any]:
    def cast(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME)

        def half(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return operator(*tree_map(half, args), **tree_map(half, kwargs))

    return cast


class _FusedAttention(torch.autograd.Function):
    """Allocates as a fused attention does: it keeps query, key, value, output, and a float32 number for each row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)  # one kernel
        rows = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return _one_kernel(query), torch.empty_like(key), torch.empty_like(value)


def _fuse_attention() -> None:
    """Replace attention on the device, which torch would spell out with memory that grows with the tokens' square."""
    plain = nn.functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.device.type != NAME:
            return plain(query, key, value, *args, **kwargs)
        if torch.is_autocast_enabled(NAME):
            query, key, value = (x.to(torch.get_autocast_dtype(NAME)) for x in (query, key, value))
        return _FusedAttention.apply(query, key, value)

    nn.functional.scaled_dot_product_attention = attend


class _FusedNorm(torch.autograd.Function):
    """Allocates as a fused root mean square norm does: it keeps its input and a float32 number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows = torch.empty(x.shape[: x.dim() - weight.dim()], dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, weight, rows)
        return _one_kernel(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return _one_kernel(x), _one_kernel(weight) if ctx.needs_input_grad[1] else None


def _one_kernel(like: Tensor) -> Tensor:
    return torch.zeros_like(like)


def _fuse_norm() -> None:
    """Replace ``rms_norm`` on the device, which is one kernel on GPUs and which torch would spell out here."""
    plain = nn.functional.rms_norm

    def norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if x.device.type != NAME or weight is None or weight.dtype != x.dtype:
            return plain(x, shape, weight, eps)
        return _FusedNorm.apply(x, weight)

    nn.functional.rms_norm = norm


@contextmanager
def without_weights() -> Iterator[None]:
    """Let tensors that are made within have no numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.checkpoint import set_checkpoint_early_stop

    # checkpointing ends its recomputation early by an exception, which must not leave a backward thread here
    with FakeTensorMode(allow_non_fake_inputs=True), set_checkpoint_early_stop(False):
        yield


def place_without_numbers(module: nn.Module, device: torch.device) -> None:
    """Give the parameters and buffers of a module places on the device; call it within ``without_weights``.

    Those that have places there keep them, as another module may hold them too.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    made: dict[int, Any] = {}  # tied parameters stay one
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None or (isinstance(parameter, FakeTensor) and parameter.device.type == device.type):
                continue
            if id(parameter) not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                made[id(parameter)] = (nn.Parameter(empty, parameter.requires_grad), parameter)
            part._parameters[name] = made[id(parameter)][0]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


@dataclass(frozen=True)
class Measured:
    """The memory and the kernels of a step."""

    resident: int  # bytes of weights and other tensors that were there before
    peak: int  # bytes at the worst moment, the resident ones included
    kernels: int  # operations that launch one on a GPU, about


def _is_on_host(values: list[object]) -> bool:
    """Whether an operation has numbers: all its tensors are the host's own, and so is its result."""
    from torch._subclasses.fake_tensor import FakeTensor

    return not any(
        isinstance(value, FakeTensor) or (isinstance(value, torch.device) and value.type != "cpu") for value in values
    )


def _without_numbers(value: object) -> object:
    """A tensor with numbers, as the mode of ``without_weights`` has tensors; anything else as it is."""
    from torch._subclasses.fake_tensor import FakeTensor

    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    is_real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
    return mode.from_tensor(value) if mode is not None and is_real else value


class Trace(TorchDispatchMode):
    """Counts what operations within allocate on one type of device.

    What is computed on the host alone, such as keyed draws and the optimizer's count of steps, has its numbers.
    """

    def __init__(self, device_type: str = NAME) -> None:
        super().__init__()
        self.now = self.peak = self.kernels = 0
        self._device_type = device_type
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def track(self, value: object) -> None:
        """Count the storage of a tensor, once, until it is freed."""
        if not isinstance(value, Tensor) or value.device.type != self._device_type:
            return
        storage = value.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_on_host(tree_leaves((args, kwargs))):
            from torch._subclasses.fake_tensor import unset_fake_temporarily

            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        else:
            out = func(*tree_map(_without_numbers, args), **tree_map(_without_numbers, kwargs))
        leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        on_device = any(leaf.device.type == self._device_type for leaf in leaves)
        self.kernels += on_device and func.namespace == "aten" and not func.is_view and func.name() not in _NO_KERNEL
        for leaf in leaves:
            self.track(leaf)
        return out


def measure(step: Callable[[], object], resident: Iterable[Tensor], *, device_type: str = NAME) -> Measured:
    """Take a step twice and measure the second, when gradients and the optimizer's state have their places.

    Args:
        resident: tensors that are on the device all the time, such as weights.
    """
    trace = Trace(device_type)
    for tensor in resident:
        trace.track(tensor)
    before = trace.now
    with trace:
        step()
        first = trace.kernels
        step()
    return Measured(before, trace.peak, trace.kernels - first)
