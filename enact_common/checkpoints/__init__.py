"""Files of weights: written, read, fitted to a model, and what they say of themselves."""
