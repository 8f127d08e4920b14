"""Rows to batches: sources, formats, chat templates, packing, audit."""
