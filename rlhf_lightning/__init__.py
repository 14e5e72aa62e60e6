"""PyTorch Lightning framework for research on learning from human feedback."""
