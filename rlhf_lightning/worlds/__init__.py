"""Small worlds with a known gold reward, made by code from a seed: what an objective achieves can be measured."""
