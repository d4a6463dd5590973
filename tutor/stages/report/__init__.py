"""tutor.stages.report: ..."""
