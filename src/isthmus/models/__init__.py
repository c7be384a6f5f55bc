"""The nets, one file per paper. What else is to be known about each stands in :mod:`isthmus.systems`."""
