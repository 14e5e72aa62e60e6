"""Language models as the stages use them: loaded, laid out, sampled from and exported. No losses, no Trainer."""
