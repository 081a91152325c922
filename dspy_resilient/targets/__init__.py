"""Where calls may go: targets, the routes to their providers, and their fallbacks."""
