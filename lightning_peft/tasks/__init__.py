"""Tasks, a file or a folder each: the rows it brings, if any, and how answers to them are scored."""
