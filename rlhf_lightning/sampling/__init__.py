"""Sampling engines: slots with continuous batching, transformers' generate, and servers."""
