"""Who asks, what they get: the HTTP app, its answering, its command line and its page."""
