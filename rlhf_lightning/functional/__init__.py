"""The mathematics of alignment as pure functions of tensors.

Each function names its equation and paper, takes plain tensors and settings, holds no state and knows no model, module
or Trainer. Losses are returned unreduced, one value per pair, group, row or token. The caller reduces them, because
only the caller knows the counts of the whole optimizer step.
"""
