"""Documents in one SQLite file, and what is found in them by indexes in memory: the place of one server."""
