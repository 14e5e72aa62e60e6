"""The checks of each family's contract."""
