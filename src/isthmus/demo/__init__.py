"""The demo: scenes drawn from a seed, the recipes that learn them, and the story that trains and shows all systems.

Nothing but the command line imports this package. Scenes come in by name, as a user's own source does; the recipes
in ``library/`` are found by name beside those of :mod:`isthmus.recipes`.

scenes/   pictures of coloured solids with their full ground truth      story   `isthmus demo` from start to report
library/  clip-tiny, lm-tiny, ... and the longer recipes on scenes     jobs    several trainings side by side
"""
