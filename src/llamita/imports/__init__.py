"""Models in the forms of others, read into ours."""
