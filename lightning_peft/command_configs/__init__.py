"""The root configs of the commands beside `train`, a module for commands of a kind."""
