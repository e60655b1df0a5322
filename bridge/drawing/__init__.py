"""A model's blocks as a picture: what is drawn, where, and in the terminal, as SVG and as PNG."""
