"""Language models as the stages use them: loading, row layouts, forward passes and export. No losses, no Trainer."""
