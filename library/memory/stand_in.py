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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from library.memory.transfers import Transfers

NAME = "standin"
#: operators that autocast computes in half precision, as on a GPU
_IN_HALF = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv2d", "_convolution")
#: operators that launch nothing: they give memory, or another shape to what is there
_NO_KERNEL = frozenset(
    f"aten::{name}" for name in ("empty.memory_format", "empty_like", "empty_strided", "new_empty", "_unsafe_view")
)
#: launches of operators on lists of tensors: numbers in a chunk, chunks of a launch, and tensors of a launch by how many
#: lists it reads and writes (torch's MultiTensorApply.cuh, with kernel arguments of 4 KB)
_CHUNK, _CHUNKS, _TENSORS = 65536, 320, {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
#: registrations end with these objects
_libraries: list[torch.library.Library] = []
#: storages that stand for memory of the host: tensors without numbers cannot change their device
_on_host: weakref.WeakSet[Any] = weakref.WeakSet()


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
        out = _one_kernel(query)  # in memory as the queries are
        rows = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        # three kernels: sums over the outputs' rows, the gradients in float32, and those of the queries rounded
        return _one_kernel(query), _one_kernel(key), _one_kernel(value)


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
    """Allocates as a fused root mean square norm does: it keeps its input and a float32 number for each row.

    Both passes read rows that lie one after the other, so anything else is copied first.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, rows: int) -> Tensor:
        roots = torch.empty(x.shape[:rows], dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, weight, roots)
        return _one_kernel(x.contiguous())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, _ = ctx.saved_tensors
        copies = x.contiguous(), gradient.contiguous()
        return _one_kernel(copies[0]), _one_kernel(weight) if ctx.needs_input_grad[1] else None, None


def _one_kernel(like: Tensor) -> Tensor:
    return torch.zeros_like(like)


def _fuse_norm() -> None:
    """Replace ``rms_norm`` on the device, which torch would spell out here.

    On NVIDIA GPUs it is ``_fused_rms_norm``, one kernel, if the weight has the input's dtype.
    """
    plain = nn.functional.rms_norm

    def norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if x.device.type != NAME or (weight is not None and weight.dtype != x.dtype):
            return plain(x, shape, weight, eps)
        return _FusedNorm.apply(x, weight, x.dim() - len(shape))

    nn.functional.rms_norm = norm


@contextmanager
def without_weights() -> Iterator[None]:
    """Let tensors that are made within have no numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.checkpoint import set_checkpoint_early_stop

    # checkpointing ends its recomputation early by an exception, which must not leave a backward thread here
    with FakeTensorMode(allow_non_fake_inputs=True), set_checkpoint_early_stop(False):
        yield


def place_without_numbers(module: nn.Module, device: torch.device) -> dict[Tensor, nn.Parameter]:
    """Give the parameters and buffers of a module places on the device; call it within ``without_weights``.

    Those that have places there keep them, as another module may hold them too. Returns the new parameter of each
    other one.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    made: dict[Tensor, nn.Parameter] = {}  # tied parameters stay one
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None or (isinstance(parameter, FakeTensor) and parameter.device.type == device.type):
                continue
            if parameter not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                made[parameter] = nn.Parameter(empty, parameter.requires_grad)
            part._parameters[name] = made[parameter]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return made


class HostMemory(Transfers):
    """Transfers of tensors without numbers: what lies on the host is not counted, and nothing is copied."""

    def host_memory(self, size: int, dtype: torch.dtype) -> Tensor:
        made = torch.empty(size, dtype=dtype, device=self._device)
        _on_host.add(made.untyped_storage())
        return made

    def start(self, pairs: Sequence[tuple[Tensor, Tensor]], *, after: Iterable[Any] = ()) -> None:
        """Copy nothing."""


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
        if storage in self._seen or storage in _on_host:
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
        for leaf in tree_leaves(out):
            self.track(leaf)
        self.kernels += self._launches(func, args, kwargs, out)
        return out

    def _launches(self, func: Any, args: Any, kwargs: Any, out: Any) -> int:
        """Return how many kernels an operator is on an NVIDIA GPU, about."""
        if func.namespace != "aten" or func.is_view or func.name() in _NO_KERNEL:
            return 0
        name = func.name().removeprefix("aten::").partition(".")[0]
        on_lists = name.startswith(("_foreach_", "_fused_adam", "_fused_sgd"))  # most of them return nothing
        tensors = [leaf for leaf in tree_leaves((args, kwargs) if on_lists else out) if isinstance(leaf, Tensor)]
        if not any(tensor.device.type == self._device_type for tensor in tensors):
            return 0
        if on_lists:
            return _launches_on_lists(args, writes_new=out is not None)
        if name.startswith("native_layer_norm"):
            # they read rows that lie one after the other; gradients of weight and bias are a kernel of their own
            read = args[:2] if name == "native_layer_norm_backward" else args[:1]
            copies = sum(not tensor.is_contiguous() for tensor in read)
            mask = args[-1] if name == "native_layer_norm_backward" else [True]
            return copies + bool(mask[0]) + any(mask[1:])
        return 1


def _launches_on_lists(args: Any, *, writes_new: bool) -> int:
    """Return the launches of an operator on lists of tensors."""
    lists = [value for value in args if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor)]
    most = _TENSORS[min(len(lists) + writes_new, max(_TENSORS))]
    launches = tensors = chunks = 0
    for tensor in lists[0]:
        tensors += 1
        left = -(-tensor.numel() // _CHUNK)
        while left:
            taken = min(left, _CHUNKS - chunks)
            left, chunks = left - taken, chunks + taken
            if chunks == _CHUNKS or (tensors == most and not left):
                launches, chunks, tensors = launches + 1, 0, 1 if left else 0
    return launches + (chunks > 0)


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
