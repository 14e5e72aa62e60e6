"""Constitutional AI: principles, critique and revision, labels from judges, `rlhf critique`, `rlhf label`."""
