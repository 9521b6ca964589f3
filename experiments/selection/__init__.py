"""Which pairs to ask the oracle about: the error of a fitted step against the labels that it took."""
