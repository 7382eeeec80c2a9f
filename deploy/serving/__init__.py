"""A build behind Open Inference Protocol v2; imports neither torch nor anything that builds."""
