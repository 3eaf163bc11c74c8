"""What leaves the store: pictures and files that other programs open."""
