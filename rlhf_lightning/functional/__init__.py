"""The arithmetic of alignment as pure functions: tensors in, tensors out.

Each function names its equation and paper, takes plain tensors and settings, holds no state and knows no model, module
or Trainer. Losses come back unreduced, one value per pair, group, row or token: reducing them belongs to the caller,
who alone knows the counts of the whole optimizer step.
"""
