"""tutor.stages.data.lint: ..."""
