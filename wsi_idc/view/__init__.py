"""The slide with its map in a browser, served on the loopback address."""
