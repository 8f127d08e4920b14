"""One run: the machine it gets, what it decides before a weight is read, its folder, its ranks, its Trainer."""
