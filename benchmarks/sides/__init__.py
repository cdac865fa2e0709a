"""The sides of the comparisons of speed: one architecture trained in several ways, each in a process of its own."""
