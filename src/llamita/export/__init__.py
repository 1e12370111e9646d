"""Write packed models in the formats of other runtimes."""
