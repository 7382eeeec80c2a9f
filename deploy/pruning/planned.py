"""A plan's pruning carried out on a module, with the samples that it is traced, ranked and proven on."""

import torch
from torch import nn

from calibration.dataset import Dataset
from calibration.spec import usable_batch
from deploy.planner import Pruning
from deploy.pruning.channels import ChannelPruning, prune_channels
from deploy.pruning.objective import calibration_loss
from exporters.capture import order_inputs

BATCH = 32
NEEDS_LOSS = ("taylor",)


def prune_as_planned(module: nn.Module, data: Dataset, pruning: Pruning, *, seed: int) -> ChannelPruning:
    """The module without the channels that the plan removes. Raises as `prune_channels`."""
    ordered, _ = order_inputs(module, data.specs)
    batch = data.batch(0, usable_batch(data.specs, BATCH))
    return prune_channels(
        module,
        tuple(torch.from_numpy(batch[spec.name]) for spec in ordered),
        sparsity=pruning.sparsity,
        of=pruning.of,  # type: ignore[arg-type] # checked when deploy.toml was read
        criterion=pruning.criterion,  # type: ignore[arg-type] # checked by the planner
        ranking=pruning.ranking,  # type: ignore[arg-type] # checked when deploy.toml was read
        min_channels=pruning.min_channels,
        channel_multiple=pruning.multiple,
        exclude=pruning.exclude,
        loss=calibration_loss(data, data.specs, batch=BATCH) if pruning.criterion in NEEDS_LOSS else None,
        seed=seed,
    )
