"""Models whose blocks run elsewhere, with the faces that transformers gives them."""
