"""A command that is kept running until it is done: restarted when it is stopped, crashes, hangs."""
