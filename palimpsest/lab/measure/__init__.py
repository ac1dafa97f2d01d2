"""Points that measure rather than train: cost of a context, spectra of transitions, states in few bits."""
