"""tutor.recipe: ..."""
