"""Small parts that know nothing of calls: a worker thread, renewal after a fork, redaction."""
