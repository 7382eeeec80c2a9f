"""The product: plan, prune, recover, quantize, export, validate, measure, bundle."""
