"""A packed directory in the forms of other runtimes."""
