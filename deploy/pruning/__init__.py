"""What is removed from a model, and the record that rebuilds it.

`METHODS` names each structured method and where it lives; nothing is imported until one is asked for.
"""

METHODS = {
    "channels": "deploy.pruning.channels:prune_channels",
}
