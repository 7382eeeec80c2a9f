"""Weight masks: which single weights become zero. Free functions on tensors, then on modules.

Magnitude pruning as in Han et al. 2015, Learning both Weights and Connections for Efficient Neural Networks,
arXiv:1506.02626: the weights nearest to zero go.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from deploy.pruning.naming import matching
from targets.errors import UsageError

MOST_SPARSE = 0.98
"""No layer loses more than this share to a global ranking: a layer of nothing but zeros cuts the network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMask:
    """A layer's mask: `kept` has the weight's shape and is True where a weight stays."""

    layer: str
    kind: str
    kept: Tensor

    @property
    def weights(self) -> int:
        """All of them."""
        return self.kept.numel()

    @property
    def zeros(self) -> int:
        """The weights that become zero."""
        return self.weights - int(self.kept.sum())


def smallest(scores: Tensor, count: int) -> Tensor:
    """True for exactly `count` of the lowest scores, in the scores' shape; of equal ones the first go."""
    order = torch.argsort(scores.flatten(), stable=True)
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen.reshape(scores.shape)


def uniform_masks(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """For each layer what is kept, the same share removed from every one, at most MOST_SPARSE."""
    share = min(sparsity, MOST_SPARSE)
    counts = {name: min(round(share * each.numel()), each.numel() - 1) for name, each in scores.items()}
    return {name: ~smallest(each, counts[name]) for name, each in scores.items()}


def global_masks(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """For each layer what is kept, all weights ranked together, none losing more than MOST_SPARSE.

    Exactly round(sparsity * all weights) go, as far as MOST_SPARSE allows.
    """
    masks: dict[str, Tensor] = {}
    left = round(sparsity * sum(each.numel() for each in scores.values()))
    open_scores = dict(scores)
    while open_scores:
        chosen = _together(open_scores, left)
        most = {name: int(MOST_SPARSE * each.numel()) for name, each in chosen.items()}
        over = {name: most[name] for name, each in chosen.items() if each.sum() > most[name]}
        if not over:
            return masks | {name: ~each for name, each in chosen.items()}
        for name, count in over.items():
            masks[name] = ~smallest(open_scores.pop(name), count)
            left -= count
    return masks


def _together(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    joined = smallest(torch.cat([each.flatten() for each in scores.values()]), count)
    pieces = torch.split(joined, [each.numel() for each in scores.values()])
    return {
        name: piece.reshape(each.shape) for (name, each), piece in zip(scores.items(), pieces, strict=True)
    }


def rank(scores: Mapping[str, Tensor], sparsity: float, ranking: str) -> dict[str, Tensor]:
    """For each layer what is kept. Raises UsageError for a share that leaves nothing or takes nothing."""
    if not 0 < sparsity < 1:
        raise UsageError(
            "the sparsity cannot be used",
            found=sparsity,
            expected="above 0 and below 1",
            fix="for example 0.8",
        )
    if not scores:
        raise UsageError(
            "no weights may be removed",
            found="no convolution or linear layer beside the first, the last and the excluded ones",
            expected="layers whose weights a mask can thin",
            fix="leave [prune] out, or exclude less",
        )
    return (global_masks if ranking == "global" else uniform_masks)(scores, sparsity)


def magnitude_masks(
    module: nn.Module, *, sparsity: float, ranking: str, exclude: Sequence[str]
) -> list[LayerMask]:
    """Masks of the module's layers by |w|. Raises as `rank`."""
    layers = prunable(module, exclude)
    kept = rank({name: _weight(layer).abs() for name, layer in layers.items()}, sparsity, ranking)
    return [
        LayerMask(layer=name, kind=type(layer).__name__, kept=kept[name]) for name, layer in layers.items()
    ]


def prunable(module: nn.Module, exclude: Sequence[str]) -> dict[str, nn.Module]:
    """The layers by path whose weights a mask may thin, in the module's order.

    Convolutions and linear layers but the first and the last as the module lists them, which mostly see the
    input and give the answer; no grouped convolution, whose few weights no kernel skips; each shared weight
    once; none whose weight is computed from others (weight_norm and the like).
    """
    seen: set[int] = set()
    layers: dict[str, nn.Module] = {}
    for name, layer in module.named_modules():
        weight = layer._parameters.get("weight")
        if isinstance(layer, (_ConvNd, nn.Linear)) and weight is not None and id(weight) not in seen:
            seen.add(id(weight))
            layers[name] = layer
    excluded = set(matching(module, exclude))
    inner = (name for name in list(layers)[1:-1] if name not in excluded)
    return {name: layers[name] for name in inner if getattr(layers[name], "groups", 1) == 1}


def _weight(layer: nn.Module) -> Tensor:
    return layer.get_parameter("weight").detach()


def apply_(module: nn.Module, masks: Sequence[LayerMask]) -> None:
    """Sets the masked weights of the module to zero. In place."""
    with torch.no_grad():
        for mask in masks:
            module.get_parameter(f"{mask.layer}.weight").mul_(mask.kept)


def held(module: nn.Module, layers: Sequence[str]) -> dict[str, Tensor]:
    """The masks that a masked module carries in its zeros, by parameter, for these layers."""
    return {f"{layer}.weight": module.get_parameter(f"{layer}.weight").detach() != 0 for layer in layers}
