"""Feedback store: its file format, its records, and training rows from its judgements."""
