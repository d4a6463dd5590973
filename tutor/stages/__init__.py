"""One module a stage, in the pipeline's order; none imports another."""
