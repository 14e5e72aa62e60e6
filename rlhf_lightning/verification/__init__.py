"""Verification of objectives: contracts, oracles, the enumerable world, and `rlhf verify`."""
