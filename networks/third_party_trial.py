"""Try a network of another project before the first step, so that it cannot fail only at the end."""

from __future__ import annotations

import logging
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.files.safetensors_io import read_header
from networks.third_party import is_ours, other_arguments

logger = logging.getLogger(__name__)


@contextmanager
def naming_module(module_name: str, doing: str) -> Iterator[None]:
    """Turn errors of a third-party network into one line that names its module.

    Args:
        doing: the action, completing "it failed ...": "to save its weights".
    """
    try:
        yield
    except Exception as error:
        if is_clear(error):
            raise
        raise UserError(f"--network_module {module_name}: it failed {doing}: {describe(error)}") from error


def is_clear(error: Exception) -> bool:
    """Whether an error needs no name of the module, or is not about the module."""
    # on the meta device a network may only lack the weights, which callers check
    on_meta = torch.get_default_device().type == "meta" or "meta tensor" in str(error)
    lacks_weights = isinstance(error, RuntimeError) and on_meta
    return lacks_weights or isinstance(error, (UserError, MemoryError, torch.cuda.OutOfMemoryError))


def fault_of(module_name: str, error: Exception) -> str:
    """Describe an error raised by the code of a third-party network; empty for any other.

    The innermost function outside of torch decides: a network's forward pass may hand wrong shapes to torch.
    """
    module = sys.modules.get(module_name)
    if is_ours(module_name) or is_clear(error) or module is None or not getattr(module, "__file__", None):
        return ""
    package = sys.modules.get(module_name.partition(".")[0], module)
    # a module file of the user is the whole of it; a package is all of its folder
    theirs = Path(str(package.__file__)).parent if hasattr(package, "__path__") else Path(str(module.__file__))
    within_torch = Path(str(torch.__file__)).parent
    frames = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
    place = next((path for path in reversed(frames) if not path.is_relative_to(within_torch)), None)
    if place is None or not place.is_relative_to(theirs):
        return ""
    return f"--network_module {module_name}: it failed during training: {describe(error)}"


def describe(error: Exception) -> str:
    """Describe an error of another project in one line, with its class and the place that raised it."""
    what = " ".join(str(error).split())
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f" ({Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno})" if place is not None else ""
    return f"{type(error).__name__}{f': {what}' if what else ''}{where}"


def make_network(
    module_name: str, make: Callable[[Mapping[str, str]], Any], given: Mapping[str, object]
) -> tuple[Any, Mapping[str, str]]:
    """Return the network from ``make``, and the network args that it needed beside the given ones.

    Args:
        make: called with network args; it raises the module's errors.
        given: the network args of the command line.

    Raises:
        UserError: a third-party module failed. Our modules raise their own errors.
    """
    try:
        return make({}), {}
    except Exception as error:
        if is_ours(module_name) or is_clear(error):
            raise
        more = other_arguments(module_name, str(error), given)
        if more is None:
            raise UserError(
                f"--network_module {module_name}: it could not make a network: {describe(error)}; see its own "
                "documentation on --network_args"
            ) from error
    shown = " ".join(f"{key}={value}" for key, value in more.items())
    logger.warning(
        "--network_module %s: it fails with its default preset on this model; %s is used", module_name, shown
    )
    with naming_module(module_name, "to make a network"):
        return make({key: str(Path(__file__).resolve().parents[1] / value) for key, value in more.items()}), more


def keep_states_plain(network: nn.Module) -> None:
    """Make every tensor of the network's ``state_dict()`` contiguous, in its own memory.

    safetensors needs that: convolutions of channels_last models are not contiguous, and neither are weights that a
    network copies from them.
    """

    def hook(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        seen: set[int] = set()
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor) or tensor.is_meta:
                continue
            place = tensor.untyped_storage().data_ptr()
            if not tensor.is_contiguous():
                state[name] = tensor.contiguous()
            elif place in seen and tensor.numel():
                state[name] = tensor.clone()
            seen.add(place)

    network.register_state_dict_post_hook(hook)


def try_saving(network: Any, module_name: str, folder: Path, *, suffix: str, dtype: torch.dtype | None) -> None:
    """Save the network once, into a temporary folder within ``folder``, and check the file.

    Raises:
        UserError: it could not be saved, or the file cannot be read.
    """
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=".trial-") as trial,
        naming_module(module_name, "to save its weights, which was tried before the first step"),
    ):
        file = Path(trial) / f"trial{suffix}"
        network.save_weights(str(file), dtype, {"ss_network_module": module_name})
        if not file.is_file():
            raise UserError(
                f"--network_module {module_name}: save_weights wrote no file, which was tried before the first step"
            )
        if suffix == ".safetensors" and not read_header(file).tensors:
            raise UserError(f"--network_module {module_name}: save_weights wrote no tensors; there is nothing to train")


def why_states_do_not_resume(network: nn.Module) -> str | None:
    """Load the network's own state, as ``--resume`` does, and return what goes wrong; None if it works.

    Its parameters are unchanged afterwards.
    """
    kept = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    try:
        network.load_state_dict(dict(network.state_dict()))
    except Exception as error:
        return describe(error)[:200]
    finally:
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(kept[name])
    return None


def check_states(network: nn.Module, module_name: str, *, resumes: bool, saves_states: bool) -> None:
    """Report at the start what could not be resumed.

    Args:
        resumes: whether this run resumes from a state.
        saves_states: whether it writes states.

    Raises:
        UserError: the network cannot take its own state back, and ``resumes``.
    """
    if not (resumes or saves_states) or (why := why_states_do_not_resume(network)) is None:
        return
    if resumes:
        raise UserError(
            f"--resume: networks of {module_name} with these --network_args cannot be resumed, they do not take back "
            f"their own state ({why}); begin a new run with the weights (--network_weights)"
        )
    logger.warning(
        "--save_state: networks of %s with these --network_args do not take back their own state (%s): the states that "
        "this run saves cannot be resumed, its weights can be taken up with --network_weights",
        *(module_name, why),
    )
