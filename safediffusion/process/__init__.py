"""One stochastic denoising step, the same object for sampling and for scoring, for every model family."""
