"""Every read beyond one line, by what it is of."""
