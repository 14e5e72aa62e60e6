"""Memory and FLOPs of a run, estimated before it starts: `rlhf plan`."""
