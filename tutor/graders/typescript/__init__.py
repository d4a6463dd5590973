"""tutor.graders.typescript: ..."""
