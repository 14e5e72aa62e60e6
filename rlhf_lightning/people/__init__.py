"""Human feedback: annotation page, item selection, simulated annotators, `rlhf annotate` and `rlhf loop`."""
