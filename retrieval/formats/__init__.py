"""Files in, text with structure out: a module for each format, `reading` to tell which one a file needs."""
