"""One file per resource; each has the handlers of its paths."""
