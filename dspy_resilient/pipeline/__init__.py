"""One call from top to bottom: the page (`call`), its state, its drivers, and the attempt."""
