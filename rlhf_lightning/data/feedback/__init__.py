"""Feedback store: its file format, its records, and the training rows made of them."""
