"""The stages as LightningModules. No loss arithmetic here: forward -> functional -> log."""
