"""One paper per file, nothing else: each file holds its whole round on one screen and knows neither links nor ranks."""
