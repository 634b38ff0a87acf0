"""Multiple-instance models, one paper a file, and the names they are asked for by."""
