"""Independent transcriptions of what objectives should find, solved apart from the package's own losses."""
