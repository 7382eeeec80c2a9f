"""Training goes on from a pruned checkpoint: the moments belong to the channels that stay."""

import copy
from typing import Any

import pytest
import torch
from oddities import Plain, Residual, example, settled
from torch import Tensor, nn
from torch.nn import functional

from deploy.pruning.channels import ChannelPruning, prune_channels
from deploy.pruning.checkpoint import prune_checkpoint
from targets.errors import ModelError, UsageError

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.002, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.002),
}


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step % 4)
    labels = torch.arange(16) % 10
    images = torch.randn(16, 3, 8, 8, generator=generator) + labels[:, None, None, None] / 3
    return images, labels


def train(module: nn.Module, optimizer: Any, steps: range) -> list[float]:
    module.train()
    losses = []
    for step in steps:
        images, labels = batch(step)
        loss = functional.cross_entropy(module(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def dead_channels(module: nn.Module) -> None:
    """Half of the inner channels stop mattering: what makes and what reads them is zero."""
    with torch.no_grad():
        for layer, after in ((module.one, module.two), (module.two, module.three)):
            layer[0].weight[16:] = 0.0
            layer[1].weight[16:] = layer[1].bias[16:] = 0.0
            after[0].weight[:, 16:] = 0.0


def trained(name: str) -> tuple[nn.Module, Any]:
    module = settled(Plain)
    optimizer = OPTIMIZERS[name](module.parameters())
    train(module, optimizer, range(12))
    return module, optimizer


def checkpoint_of(module: nn.Module, optimizer: Any) -> dict[str, Any]:
    state = {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "step": 12, "epoch": 3}
    return copy.deepcopy(state)


def pruned(module: nn.Module, **options: Any) -> ChannelPruning:
    return prune_channels(module, example(Plain), sparsity=0.4, criterion="l2", **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_those_of_the_surviving_channels(name: str) -> None:
    module, optimizer = trained(name)
    result = pruned(module)
    smaller = prune_checkpoint(checkpoint_of(module, optimizer), result.delta)
    moments = {"sgd": ["momentum_buffer"]}.get(name, ["exp_avg", "exp_avg_sq"])
    moments += ["max_exp_avg_sq"] if name == "adam" else []
    rows = list(result.delta.tensors["two.0.weight"].kept[0])
    columns = list(result.delta.tensors["two.0.weight"].kept[1])
    number = [name for name, _ in module.named_parameters()].index("two.0.weight")
    for moment in moments:
        dense = optimizer.state_dict()["state"][number][moment]
        assert torch.equal(smaller["optimizer"]["state"][number][moment], dense[rows][:, columns])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_continues_without_a_jump_where_what_went_was_worth_nothing(name: str) -> None:
    module, optimizer = trained(name)
    dead_channels(module)
    for parameter in (module.one[0].weight, module.two[0].weight):
        for moment in optimizer.state[parameter].values():
            if moment.dim() == 4:
                moment[16:] = 0.0
    result = prune_channels(
        module, example(Plain), sparsity=0.566, criterion="l2", channel_multiple=16, exclude=["three"]
    )
    for layer in ("one", "two"):
        assert result.delta.tensors[f"{layer}.0.weight"].kept[0] == tuple(range(16))
    smaller = prune_checkpoint(checkpoint_of(module, optimizer), result.delta)
    resumed = copy.deepcopy(result.module)
    resumed.load_state_dict(smaller["model"])
    fresh = OPTIMIZERS[name](resumed.parameters())
    fresh.load_state_dict(smaller["optimizer"])
    first = train(module, optimizer, range(12, 13))[0]
    after = train(resumed, fresh, range(12, 16))
    assert after[0] == pytest.approx(first, rel=1e-4)
    # A fresh optimizer has lost its moments and goes elsewhere: the state made the difference.
    forgetful = copy.deepcopy(result.module)
    forgotten = train(forgetful, OPTIMIZERS[name](forgetful.parameters()), range(12, 16))
    assert abs(forgotten[1] - after[1]) > 1e-5
    assert after[-1] < after[0] * 1.5


def test_the_weights_load_into_the_pruned_module_and_the_rest_is_handed_on() -> None:
    module, optimizer = trained("adamw")
    result = pruned(module)
    smaller = prune_checkpoint(checkpoint_of(module, optimizer), result.delta)
    result.module.load_state_dict(smaller["model"], strict=True)
    assert (smaller["step"], smaller["epoch"]) == (12, 3)
    assert smaller["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_weights_are_found_under_the_usual_names(key: str, prefix: str) -> None:
    module = settled(Plain)
    result = pruned(module)
    state = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    smaller = prune_checkpoint({key: state, "ema": dict(state)}, result.delta)
    for part in (key, "ema"):
        sliced = {name.removeprefix(prefix): tensor for name, tensor in smaller[part].items()}
        result.module.load_state_dict(sliced, strict=True)


def test_a_bare_state_dict_is_a_checkpoint() -> None:
    module = settled(Plain)
    result = pruned(module)
    result.module.load_state_dict(prune_checkpoint(module.state_dict(), result.delta), strict=True)


def test_the_checkpoint_is_not_touched() -> None:
    module, optimizer = trained("adam")
    checkpoint = checkpoint_of(module, optimizer)
    shape = checkpoint["model"]["two.0.weight"].shape
    prune_checkpoint(checkpoint, pruned(module).delta)
    assert checkpoint["model"]["two.0.weight"].shape == shape
    number = [name for name, _ in module.named_parameters()].index("one.0.weight")
    assert checkpoint["optimizer"]["state"][number]["exp_avg"].shape == module.one[0].weight.shape


def grouped(module: nn.Module, named: bool) -> Any:
    items = list(module.named_parameters()) if named else [(n, p) for n, p in module.named_parameters()]
    flat = [item for item in items if item[1].dim() == 1]
    deep = [item for item in items if item[1].dim() > 1]
    parts = (deep, flat) if named else ([p for _, p in deep], [p for _, p in flat])
    optimizer = torch.optim.AdamW([{"params": parts[0]}, {"params": parts[1], "weight_decay": 0.0}], lr=1e-3)
    train(module, optimizer, range(2))
    return optimizer, [name for name, _ in (*deep, *flat)]


def test_groups_of_an_optimizer_are_told_apart_by_names() -> None:
    module = settled(Plain)
    optimizer, order = grouped(module, named=False)
    result = pruned(module)
    checkpoint = checkpoint_of(module, optimizer)
    with pytest.raises(UsageError, match=r"cannot be told apart.*parameter_order"):
        prune_checkpoint(checkpoint, result.delta)
    smaller = prune_checkpoint(checkpoint, result.delta, parameter_order=order)
    shapes = dict(result.module.named_parameters())
    for number, name in enumerate(order):
        assert smaller["optimizer"]["state"][number]["exp_avg"].shape == shapes[name].shape


def test_groups_of_named_parameters_need_no_help() -> None:
    module = settled(Plain)
    optimizer, order = grouped(module, named=True)
    result = pruned(module)
    smaller = prune_checkpoint(checkpoint_of(module, optimizer), result.delta)
    shapes = dict(result.module.named_parameters())
    for number, name in enumerate(order):
        assert smaller["optimizer"]["state"][number]["exp_avg"].shape == shapes[name].shape


def test_a_checkpoint_of_another_model_is_refused() -> None:
    result = pruned(settled(Plain))
    with pytest.raises(ModelError, match="do not fit the pruned model"):
        prune_checkpoint({"model": settled(Residual).state_dict()}, result.delta)
    with pytest.raises(ModelError, match="has another shape"):
        prune_checkpoint({"model": Plain(16).state_dict()}, result.delta)
    with pytest.raises(ModelError, match="holds no weights"):
        prune_checkpoint({"weights": settled(Plain).state_dict()}, result.delta)
