"""A training checkpoint made smaller: weights, optimizer state and averages sliced alike."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from deploy.pruning.delta import ArchitectureDelta, TensorDelta, slice_kept
from deploy.weights import STATE_KEYS
from targets.errors import ModelError, UsageError

_PREFIXES = ("", "module.", "_orig_mod.")  # what DataParallel and torch.compile put before names


def prune_checkpoint(
    checkpoint: Mapping[str, Any], delta: ArchitectureDelta, *, parameter_order: Sequence[str] | None = None
) -> dict[str, Any]:
    """The checkpoint of the pruned model, from which training resumes without a jump.

    Weights are found under "model", "state_dict" or "model_state_dict", or are the checkpoint itself;
    any other state of the same names (a moving average of the weights) is sliced too, and so is the
    state of every optimizer in it: moments follow the channels that stay. Everything else is handed on.

    An optimizer's state knows its parameters by number only. They are taken in the order of
    `named_parameters`; where the optimizer got them in another order, pass their names as
    `parameter_order`. Raises ModelError where names or shapes do not fit the delta, UsageError where
    an optimizer's parameters cannot be told apart.
    """
    if _is_state(checkpoint, delta):
        return _slice_state(checkpoint, delta)
    if not any(key in checkpoint for key in STATE_KEYS):
        raise ModelError(
            "the checkpoint holds no weights of the model",
            found=f"the keys {', '.join(map(str, list(checkpoint)[:6]))}",
            expected=f"a state dict, itself or under {', '.join(STATE_KEYS)}",
            fix="save {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), ...}",
        )
    result: dict[str, Any] = {}
    for key, value in checkpoint.items():
        if _is_optimizer(value):
            result[key] = _slice_optimizer(value, delta, parameter_order)
        elif key in STATE_KEYS or (isinstance(value, Mapping) and _is_state(value, delta)):
            result[key] = _slice_state(value, delta)
        else:
            result[key] = value
    return result


def _is_state(value: Mapping[Any, Any], delta: ArchitectureDelta) -> bool:
    return _prefix(value, delta) is not None and bool(delta.tensors)


def _prefix(state: Mapping[Any, Any], delta: ArchitectureDelta) -> str | None:
    names = [name for name in delta.tensors if name in delta.parameters]
    return next((prefix for prefix in _PREFIXES if all(prefix + name in state for name in names)), None)


def _slice_state(state: Mapping[str, Any], delta: ArchitectureDelta) -> dict[str, Any]:
    prefix = _prefix(state, delta)
    if prefix is None:
        missing = [name for name in delta.tensors if name not in state]
        raise ModelError(
            "the checkpoint's weights do not fit the pruned model",
            found=f"no {', '.join(missing[:5])}",
            expected="the names of the model that was pruned",
            fix="pass the checkpoint of that model",
        )
    changes = {prefix + name: change for name, change in delta.tensors.items()}
    return {name: _sliced(name, value, changes.get(name)) for name, value in state.items()}


def _sliced(name: str, value: Any, change: TensorDelta | None) -> Any:
    if change is None or not isinstance(value, Tensor):
        return value
    if tuple(value.shape) != tuple(change.before):
        raise ModelError(
            f"{name} of the checkpoint has another shape",
            found=tuple(value.shape),
            expected=str(tuple(change.before)),
            fix="pass the checkpoint of the model that was pruned",
        )
    return slice_kept(value, change)


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Mapping) and {"state", "param_groups"} <= set(value)


def _slice_optimizer(
    optimizer: Mapping[str, Any], delta: ArchitectureDelta, order: Sequence[str] | None
) -> dict[str, Any]:
    names = _parameter_names(optimizer, delta, order)
    state = {
        number: _slice_moments(names[number], moments, delta.tensors.get(names[number]))
        for number, moments in optimizer["state"].items()
    }
    return {**optimizer, "state": state}


def _parameter_names(
    optimizer: Mapping[str, Any], delta: ArchitectureDelta, order: Sequence[str] | None
) -> dict[int, str]:
    """Each number of the optimizer's state as a parameter's name."""
    groups = optimizer["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    own = [name for group in groups for name in group.get("param_names", ())]
    names = list(order or own or delta.parameters)
    unknown = sorted(set(names) - set(delta.parameters))
    # Several groups are rarely in the model's order (decayed and undecayed weights): names must say.
    ambiguous = not order and not own and len(groups) > 1
    if len(names) != len(numbers) or unknown or ambiguous:
        raise UsageError(
            "the optimizer's parameters cannot be told apart",
            found=f"unknown names {', '.join(unknown[:3])}"
            if unknown
            else f"{len(numbers)} numbers in {len(groups)} groups",
            expected=f"{len(delta.parameters)} parameters in the model's order, or their names",
            fix="pass parameter_order=, or give the optimizer model.named_parameters()",
        )
    return dict(zip(numbers, names, strict=True))


def _slice_moments(name: str, moments: Any, change: TensorDelta | None) -> Any:
    if change is None or not isinstance(moments, Mapping):
        return moments
    return {key: _slice_moment(f"{key} of {name}", value, change) for key, value in moments.items()}


def _slice_moment(name: str, value: Any, change: TensorDelta) -> Any:
    # Step counters are numbers or scalars; everything else must look like the parameter.
    if not isinstance(value, Tensor) or value.numel() == 1 != _size(change.before):
        return value
    if tuple(value.shape) != tuple(change.before):
        raise UsageError(
            f"the optimizer's state does not fit: {name}",
            found=tuple(value.shape),
            expected=f"the parameter's shape {tuple(change.before)}",
            fix="pass parameter_order= if the optimizer got its parameters in another order; factored "
            "state (Adafactor) cannot be sliced: leave the optimizer out of the checkpoint",
        )
    return slice_kept(value, change)


def _size(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
