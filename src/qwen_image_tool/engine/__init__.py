"""Where torch works: the only rooms that import it."""
